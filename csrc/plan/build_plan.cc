#include "plan/build_plan.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace jax_ep::plan {
namespace {

void FillWithNone(int32_t* values, int64_t count) { std::fill_n(values, count, kNone); }

// Sanitises every rank's input and counts the demand of each expert.
void SanitizeAndCount(const PlanShape& shape, const std::vector<RankPlan>& ranks) {
  const int32_t num_local_experts = shape.num_local_experts();
  for (const RankPlan& rank : ranks) std::fill_n(rank.demand, num_local_experts, 0);
  for (const RankPlan& rank : ranks) {
    int32_t num_invalid = 0;
    for (int32_t token = 0; token < shape.num_tokens; ++token) {
      int32_t* topk = rank.topk + int64_t{token} * shape.top_k;
      num_invalid += SanitizeToken(rank.topk_idx + int64_t{token} * shape.top_k, shape.top_k,
                                   shape.num_experts, topk);
      for (int32_t k = 0; k < shape.top_k; ++k) {
        if (topk[k] == kNone) continue;
        ++ranks[RankOfExpert(topk[k], num_local_experts)]
              .demand[LocalExpert(topk[k], num_local_experts)];
      }
    }
    rank.num_invalid[0] = num_invalid;
  }
}

void CountDropped(const PlanShape& shape, const RankPlan& rank) {
  const int32_t num_local_experts = shape.num_local_experts();
  rank.num_dropped[0] = std::accumulate(rank.demand, rank.demand + num_local_experts, 0) -
                        std::accumulate(rank.counts, rank.counts + num_local_experts, 0);
}

// How the experts of a rank share its room: see RoomShare. `demand` is that of each local expert.
RoomShare ShareRoom(const PlanShape& shape, const int32_t* demand) {
  const int32_t num_local_experts = shape.num_local_experts(), capacity = shape.capacity;
  const auto size_of = [&](int32_t local) {
    return GroupSize(Min(demand[local], shape.expert_capacity), shape.alignment, capacity);
  };
  // The sum of all groups if none of them has more than `level` rows.
  const auto sum_at = [&](int32_t level) {
    int32_t sum = 0;
    for (int32_t local = 0; local < num_local_experts; ++local) {
      sum = AddSizes(sum, Min(size_of(local), level), capacity);
    }
    return sum;
  };
  if (sum_at(capacity + 1) <= capacity) return RoomShare{capacity, 0};
  int32_t low = 0, high = capacity / shape.alignment;  // in groups of the alignment; `low` fits
  while (low < high) {
    const int32_t middle = high - (high - low) / 2;
    if (sum_at(middle * shape.alignment) <= capacity) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  RoomShare share{low * shape.alignment, 0};
  int32_t left = (capacity - sum_at(share.level)) / shape.alignment;
  for (int32_t local = 0; left > 0; ++local) {
    if (size_of(local) <= share.level) continue;
    --left;
    share.cut = local + 1;
  }
  return share;
}

// Lays out the local experts of a rank one after the other, in the order of their ids. `starts`
// gets the first row of each.
void LayOutExperts(const PlanShape& shape, const RankPlan& rank, int32_t* starts /*[L]*/) {
  const RoomShare share = ShareRoom(shape, rank.demand);
  int32_t start = 0;
  for (int32_t local = 0; local < shape.num_local_experts(); ++local) {
    const int32_t wanted = Min(rank.demand[local], shape.expert_capacity);
    rank.counts[local] = Min(wanted, share.LimitOf(local, shape.alignment));
    rank.group_sizes[local] = PaddedSize(rank.counts[local], shape.alignment, shape.masked);
    starts[local] = start;
    start += rank.group_sizes[local];
  }
}

void PlaceExpertRows(const PlanShape& shape, const std::vector<RankPlan>& ranks) {
  const int32_t num_local_experts = shape.num_local_experts();
  const int32_t rows_per_source = shape.rows_per_source();
  std::vector<int32_t> starts(shape.num_experts);
  for (int32_t r = 0; r < shape.num_ranks; ++r) {
    LayOutExperts(shape, ranks[r], starts.data() + int64_t{r} * num_local_experts);
    CountDropped(shape, ranks[r]);
  }

  std::vector<int32_t> positions(shape.num_experts, 0);
  std::vector<int32_t> num_rows_here(shape.num_ranks);  // of the current token, per rank
  std::vector<int32_t> entries;                         // the token's ks, by ascending expert
  entries.reserve(shape.top_k);
  for (int32_t r = 0; r < shape.num_ranks; ++r) {
    for (int32_t token = 0; token < shape.num_tokens; ++token) {
      const int32_t* topk = ranks[r].topk + int64_t{token} * shape.top_k;
      entries.clear();
      for (int32_t k = 0; k < shape.top_k; ++k) {
        if (topk[k] == kNone) continue;
        const auto place = std::find_if(entries.begin(), entries.end(),
                                        [&](int32_t earlier) { return topk[earlier] > topk[k]; });
        entries.insert(place, k);
      }
      const int64_t source_token = int64_t{r} * shape.num_tokens + token;
      for (int32_t k : entries) num_rows_here[RankOfExpert(topk[k], num_local_experts)] = 0;
      for (int32_t k : entries) {
        const int32_t dest = RankOfExpert(topk[k], num_local_experts);
        const int32_t row =
            ExpertRow(starts[topk[k]], ranks[dest].counts[LocalExpert(topk[k], num_local_experts)],
                      positions[topk[k]]++);
        if (row == kNone) continue;
        ranks[r].dest_row[int64_t{token} * shape.top_k + k] = row;
        ranks[dest].recv_src[row] =
            EncodeSource(shape.layout, {r, token, k}, shape.num_tokens, shape.top_k);
        ranks[dest].recv_rows[source_token * rows_per_source + num_rows_here[dest]++] = row;
      }
    }
  }
}

void PlaceTokenRows(const PlanShape& shape, const std::vector<RankPlan>& ranks) {
  const int32_t num_local_experts = shape.num_local_experts();
  for (const RankPlan& rank : ranks) {
    FillWithNone(rank.expert_idx, int64_t{shape.capacity} * shape.top_k);
    std::fill_n(rank.counts, num_local_experts, 0);
  }

  std::vector<int32_t> positions(shape.num_ranks, 0);
  for (int32_t r = 0; r < shape.num_ranks; ++r) {
    for (int32_t token = 0; token < shape.num_tokens; ++token) {
      const int32_t* topk = ranks[r].topk + int64_t{token} * shape.top_k;
      int32_t* dest_row = ranks[r].dest_row + int64_t{token} * shape.top_k;
      const int32_t source =
          EncodeSource(shape.layout, {r, token, 0}, shape.num_tokens, shape.top_k);
      for (int32_t k = 0; k < shape.top_k; ++k) {
        if (topk[k] == kNone) continue;
        const RankPlan& dest = ranks[RankOfExpert(topk[k], num_local_experts)];
        const int32_t first = FirstOnSameRank(topk, k, num_local_experts);
        if (first == k) {
          const int32_t row =
              TokenRow(shape.capacity, positions[RankOfExpert(topk[k], num_local_experts)]++);
          dest_row[k] = row;
          dest.recv_rows[source] = row;
          if (row != kNone) dest.recv_src[row] = source;
        } else {
          dest_row[k] = dest_row[first];
        }
        if (dest_row[k] == kNone) continue;
        const int32_t local = LocalExpert(topk[k], num_local_experts);
        dest.expert_idx[int64_t{dest_row[k]} * shape.top_k + k] = local;
        ++dest.counts[local];
      }
    }
  }
  for (const RankPlan& rank : ranks) {
    std::copy_n(rank.counts, num_local_experts, rank.group_sizes);
    CountDropped(shape, rank);
  }
}

}  // namespace

void BuildPlans(const PlanShape& shape, const std::vector<RankPlan>& ranks) {
  SanitizeAndCount(shape, ranks);
  const int64_t num_source_tokens = int64_t{shape.num_ranks} * shape.num_tokens;
  for (const RankPlan& rank : ranks) {
    FillWithNone(rank.dest_row, int64_t{shape.num_tokens} * shape.top_k);
    FillWithNone(rank.recv_rows, num_source_tokens * shape.rows_per_source());
    FillWithNone(rank.recv_src, shape.capacity);
  }
  if (shape.layout == Layout::kExpert) {
    PlaceExpertRows(shape, ranks);
  } else {
    PlaceTokenRows(shape, ranks);
  }
}

}  // namespace jax_ep::plan
