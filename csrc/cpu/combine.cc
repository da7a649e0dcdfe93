#include "cpu/combine.h"

#include <algorithm>
#include <string>
#include <utility>

#include "cpu/numerics.h"

namespace jax_ep::cpu {
namespace {

template <typename T>
void AddRow(const T* row, int32_t hidden, float* sum) {
  for (int32_t h = 0; h < hidden; ++h) sum[h] += ToFloat(row[h]);
}

template <typename T>
void AddWeightedRow(const T* row, float weight, int32_t hidden, float* sum) {
  for (int32_t h = 0; h < hidden; ++h) sum[h] += weight * ToFloat(row[h]);
}

template <typename T>
void AddRounded(const float* partial, int32_t hidden, float* sum) {
  for (int32_t h = 0; h < hidden; ++h) sum[h] += ToFloat(FromFloat<T>(partial[h]));
}

// Adds the contribution of rank `source_rank`'s rows to one token. `recv_rows` [M] are that token's
// rows there, `partial` [H] is scratch.
template <typename T>
void AddRank(const ops::CombineArgs& source_rank, const int32_t* recv_rows, float* partial,
             float* sum) {
  const ops::Geometry& geometry = source_rank.geometry;
  const int32_t hidden = geometry.hidden;
  const int32_t rows_per_source = geometry.rows_per_source();
  const T* rows = static_cast<const T*>(source_rank.rows);
  const auto num_rows = std::count_if(recv_rows, recv_rows + rows_per_source,
                                      [](int32_t row) { return row != plan::kNone; });
  if (num_rows == 0) return;
  const auto row_at = [&](int32_t m) { return rows + int64_t{recv_rows[m]} * hidden; };
  if (num_rows == 1 && source_rank.row_weights == nullptr) {
    // A single row is its own partial sum, already in the row dtype.
    for (int32_t m = 0; m < rows_per_source; ++m) {
      if (recv_rows[m] != plan::kNone) AddRow(row_at(m), hidden, sum);
    }
    return;
  }
  std::fill_n(partial, hidden, 0.0f);
  for (int32_t m = 0; m < rows_per_source; ++m) {
    if (recv_rows[m] == plan::kNone) continue;
    if (source_rank.row_weights == nullptr) {
      AddRow(row_at(m), hidden, partial);
    } else {
      AddWeightedRow(row_at(m), source_rank.row_weights[recv_rows[m]], hidden, partial);
    }
  }
  AddRounded<T>(partial, hidden, sum);
}

// Sums one token of rank `home`. `scratch` is [2, H].
template <typename T>
Status CombineToken(const std::vector<const ops::CombineArgs*>& ranks, int64_t home, int64_t token,
                    float* scratch) {
  const ops::Geometry& geometry = ranks[home]->geometry;
  const int32_t hidden = geometry.hidden;
  const int32_t rows_per_source = geometry.rows_per_source();
  const int64_t source_token = home * geometry.num_tokens + token;
  float* sum = scratch;
  float* partial = scratch + hidden;
  std::fill_n(sum, hidden, 0.0f);
  for (int64_t rank = 0; rank < geometry.num_ranks; ++rank) {
    const int64_t begin = source_token * rows_per_source;
    const int32_t* recv_rows = ranks[rank]->handle.recv_rows + begin;
    for (int32_t m = 0; m < rows_per_source; ++m) {
      if (recv_rows[m] < plan::kNone || recv_rows[m] >= geometry.capacity) {
        return BadHandleEntry("combine", "recv_rows", rank, begin + m, geometry.capacity,
                              recv_rows[m]);
      }
    }
    AddRank<T>(*ranks[rank], recv_rows, partial, sum);
  }
  T* y = static_cast<T*>(ranks[home]->y) + token * hidden;
  for (int32_t h = 0; h < hidden; ++h) y[h] = FromFloat<T>(sum[h]);
  return Status();
}

// Brings one token's values home to its entries.
Status FetchValues(const std::vector<const ops::CombineArgs*>& ranks, int64_t home, int64_t token) {
  const ops::CombineArgs& args = *ranks[home];
  const ops::Geometry& geometry = args.geometry;
  const int64_t top_k = geometry.top_k;
  for (int64_t k = 0; k < top_k; ++k) {
    const int64_t entry = token * top_k + k;
    const int32_t row = args.handle.dest_row[entry];
    const int32_t expert = args.handle.topk[entry];
    if (row < plan::kNone || row >= geometry.capacity) {
      return BadHandleEntry("combine", "dest_row", home, entry, geometry.capacity, row);
    }
    if (expert < plan::kNone || expert >= geometry.num_experts) {
      return BadHandleEntry("combine", "topk", home, entry, geometry.num_experts, expert);
    }
    if (row == plan::kNone || expert == plan::kNone) {
      args.home[entry] = 0.0f;
      continue;
    }
    const int32_t rank = plan::RankOfExpert(expert, geometry.num_local_experts());
    const int64_t value = geometry.layout == plan::Layout::kExpert ? row : row * top_k + k;
    args.home[entry] = ranks[rank]->values[value];
  }
  return Status();
}

template <typename T>
Status CombineTokens(const std::vector<const ops::CombineArgs*>& ranks, int64_t begin,
                     int64_t end) {
  const ops::Geometry& geometry = ranks[0]->geometry;
  std::vector<float> scratch(2 * int64_t{geometry.hidden});
  Status status;
  for (int64_t i = begin; i < end && status.ok(); ++i) {
    const int64_t home = i / geometry.num_tokens;
    const int64_t token = i % geometry.num_tokens;
    status = CombineToken<T>(ranks, home, token, scratch.data());
    if (status.ok() && ranks[home]->home != nullptr) status = FetchValues(ranks, home, token);
  }
  return status;
}

}  // namespace

RowWork CombineWork(std::vector<const ops::CombineArgs*> ranks) {
  if (const int64_t other = FindDisagreement(ranks); other != 0) {
    return RanksDisagree("combine", other);
  }
  const ops::Geometry& geometry = ranks[0]->geometry;
  RowWork work;
  work.num_rows = int64_t{geometry.num_ranks} * geometry.num_tokens;
  work.bytes_per_row = geometry.row_bytes() * std::min(geometry.top_k, geometry.num_experts);
  work.run = [ranks = std::move(ranks)](int64_t begin, int64_t end) {
    return VisitRowType(ranks[0]->geometry.dtype, [&](auto type) {
      return CombineTokens<decltype(type)>(ranks, begin, end);
    });
  };
  return work;
}

}  // namespace jax_ep::cpu
