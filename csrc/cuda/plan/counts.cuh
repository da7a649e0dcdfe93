// Steps of the plan's fast kernel (push.cu) over columns: how many entries each has, and where its
// rows begin.
#pragma once

#include <cstdint>

#include "cuda/plan/lanes.cuh"
#include "cuda/rows/room.cuh"

namespace jax_ep::cuda {
namespace {

__device__ void ClearCells(const PushShape& n, Cell* cells, int32_t num_columns) {
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < num_columns * n.stride; i += kThreads) cells[i] = {0, 0};
}

// Lanes that sum a column: so many that the lanes of all columns mostly fill one block.
template <Layout kLayout>
constexpr int kLanesOfColumn = kLayout == Layout::kToken ? 2 : 4;

// Layout "expert": the place of a column's `count` entries in the list. All lanes of the column
// pass the same `count`, and `num_listed` counts entries. Called by whole warps. The order in the
// list does not matter.
__device__ __forceinline__ int32_t PlaceInList(int32_t count, int32_t* num_listed) {
  const int32_t lane = threadIdx.x % 32;
  int32_t sum = count;
#pragma unroll
  for (int offset = kLanesOfColumn<Layout::kExpert>; offset < 32; offset *= 2) {
    const int32_t other = __shfl_up_sync(~0u, sum, offset);
    if (lane >= offset) sum += other;
  }
  int32_t first = 0;
  if (lane == 31 && sum != 0) first = atomicAdd(num_listed, sum);
  return __shfl_sync(~0u, first, 31) + sum - count;
}

// Gives each cell the number of entries before it in its column. Calls end(column, total) in all
// lanes of a column, by whole warps. A column past the last one has no entries.
template <Layout kLayout, typename End>
__device__ __forceinline__ void SumCells(const PushShape& n, Cell* cells, int32_t num_columns,
                                         End end) {
  constexpr int kLanes = kLanesOfColumn<kLayout>;
  constexpr int kCells = 16 / kLanes;  // of a lane at a time
  const int32_t part = threadIdx.x % kLanes;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i / 32 * 32 < num_columns * kLanes; i += kThreads) {
    const int32_t column = i / kLanes;
    const int32_t num_words = column < num_columns ? n.words : 0;
    Cell* of_column = cells + column * n.stride;
    int32_t total = 0;
#pragma unroll 1
    for (int32_t first = 0; first < n.words; first += kLanes * kCells) {
      const int32_t w = first + part * kCells;
      int32_t counts[kCells];
      int32_t sum = 0;
#pragma unroll
      for (int j = 0; j < kCells; ++j) {
        counts[j] = __popc(w + j < num_words ? of_column[w + j].mask : 0);
        sum += counts[j];
      }
      int32_t inclusive = sum;
#pragma unroll
      for (int offset = 1; offset < kLanes; offset *= 2) {
        const int32_t other = __shfl_up_sync(~0u, inclusive, offset, kLanes);
        if (part >= offset) inclusive += other;
      }
      int32_t before = total + inclusive - sum;
#pragma unroll
      for (int j = 0; j < kCells; ++j) {
        if (w + j < num_words) of_column[w + j].before = before;
        before += counts[j];
      }
      total += __shfl_sync(~0u, inclusive, kLanes - 1, kLanes);
    }
    end(column, total);
  }
}

// This block's counts, to all ranks.
__device__ void SendCounts(const PushParams& params, const PushMemory& shared, uint64_t epoch) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.group.num_ranks * n.quads; i += kThreads) {
    const int32_t nth = n.by_quads(i);
    const int32_t quad = i - nth * n.quads;
    int r = p.group.rank + 1 + nth;
    if (r >= p.group.num_ranks) r -= p.group.num_ranks;
    if (TestWithholds(p.group, r, WordKind::kMessage)) continue;
    const int4 counts = reinterpret_cast<const int4*>(shared.sent)[quad];
    SendPair(CountsOf(*p.group.peers[r], n, epoch, p.group.rank, blockIdx.x) + 2 * quad, epoch,
             Halves(counts.x, counts.y), Halves(counts.z, counts.w));
  }
}

// The counts of all ranks, while they arrive. Four lanes have four columns of a rank: each takes
// the counts of two blocks, and in the end has one column.
class IncomingCounts {
 public:
  // The first ones leave.
  __device__ __forceinline__ void Load(const PushParams& params, uint64_t epoch) {
    if (static_cast<int32_t>(threadIdx.x) < NumTasks(params)) Load(params, epoch, threadIdx.x);
  }

  // Takes them all; false once the group has failed.
  __device__ __forceinline__ bool Take(const PushParams& params, const PushMemory& shared,
                                       uint64_t epoch) {
    const PlanParams& p = params.plan;
    const PushShape& n = params.shape;
    const int32_t part = threadIdx.x % kLanes;
    bool ok = true;
#pragma unroll 1
    for (int32_t i = threadIdx.x; i / 32 * 32 < NumTasks(params); i += kThreads) {
      const bool inside = i < NumTasks(params);
      const int source = n.by_quads(i / kLanes);
      const int32_t quad = i / kLanes - source * n.quads;
      if (inside && i >= kThreads) Load(params, epoch, i);
      if (inside && ok) {
        for (Deadline deadline; !(pairs_[0].IsOf(epoch) && pairs_[1].IsOf(epoch));) {
          const uint64_t seen =
              pairs_[0].IsOf(epoch) ? pairs_[1].Missing(epoch) : pairs_[0].Missing(epoch);
          ok = deadline.Continue(p.group, WordKind::kMessage, source, epoch, seen);
          if (!ok) break;
          Load(params, epoch, i);
        }
      }
      // Two counts in a word are added at once. The counts of a column together are at most the
      // number of tokens, so they do not overflow. Invalid entries may be more, but the upper half
      // of their word is unused.
      uint32_t totals[2], before[2];
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const uint32_t first = pairs_[0].Data(w), second = pairs_[1].Data(w);
        const int32_t block = 2 * part;
        totals[w] = first + second;
        before[w] = (block < blockIdx.x ? first : 0) + (block + 1 < blockIdx.x ? second : 0);
      }
#pragma unroll
      for (int offset = 1; offset < kLanes; offset *= 2) {
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          totals[w] += __shfl_xor_sync(~0u, totals[w], offset);
          before[w] += __shfl_xor_sync(~0u, before[w], offset);
        }
      }
      if (!inside) continue;
      const int32_t column = 4 * quad + part;
      const uint32_t total = part < 2 ? totals[0] : totals[1];
      if (column < n.columns) {
        const int32_t shift = part % 2 * 16;
        shared.totals[source * n.columns + column] =
            Halves(total >> shift & 0xffff, (part < 2 ? before[0] : before[1]) >> shift & 0xffff);
      } else if (column == n.invalid && source == p.group.rank && blockIdx.x == 0) {
        *p.num_invalid = total;
      }
    }
    return ok;
  }

 private:
  static constexpr int kLanes = 4;
  static_assert(kBlocks == 2 * kLanes);

  __device__ __forceinline__ static int32_t NumTasks(const PushParams& params) {
    return params.plan.group.num_ranks * params.shape.quads * kLanes;
  }
  __device__ __forceinline__ void Load(const PushParams& params, uint64_t epoch, int32_t i) {
    const PushShape& n = params.shape;
    const int source = n.by_quads(i / kLanes);
    const int32_t quad = i / kLanes - source * n.quads;
    const int32_t block = 2 * (i % kLanes);
    const uint64_t* from = CountsOf(Own(params.plan.group), n, epoch, source, block) + 2 * quad;
    pairs_[0].Load(from);
    pairs_[1].Load(from + 2 * n.quads);
  }

  Pair pairs_[2] = {};
};

// Entries of all ranks in `column`; `before` gets those of the ranks before `source`, and of the
// blocks before this one there.
__device__ __forceinline__ int32_t SumRanks(const PushParams& params, const PushMemory& shared,
                                            int32_t column, int source, int32_t& before) {
  int32_t sum = 0;
#pragma unroll 2
  for (int r = 0; r < params.plan.group.num_ranks; ++r) {
    const uint32_t total = shared.totals[r * params.shape.columns + column];
    if (r == source) before = sum + static_cast<int32_t>(total >> 16);
    sum += static_cast<int32_t>(total & 0xffff);
  }
  return sum;
}

__device__ __forceinline__ int32_t AlignRows(const PushParams& params, int32_t count) {
  const int32_t alignment = params.plan.alignment;
  const int32_t past = count - params.shape.by_alignment(count) * alignment;
  return past == 0 ? count : count + (alignment - past);
}

// plan::GroupSize of an expert with this demand.
__device__ __forceinline__ int32_t SizeOfGroup(const PushParams& params, int32_t demand) {
  const int32_t wanted = plan::Min(demand, params.plan.expert_capacity);
  const int32_t capacity = params.plan.capacity;
  return wanted > capacity ? capacity + 1 : AlignRows(params, wanted);
}

// Calls body(task, rank, nth, l) for all experts l of all ranks, each warp for the `nth` 32 experts
// of a rank: l may be past the last.
template <typename Body>
__device__ __forceinline__ void ForExperts(const PushParams& params, Body body) {
  const PushShape& n = params.shape;
#pragma unroll 1
  for (int32_t i = threadIdx.x / 32; i < params.plan.group.num_ranks * n.parts; i += kWarps) {
    const int32_t r = n.by_parts(i);
    const int32_t nth = i - r * n.parts;
    body(i, r, nth, nth * 32 + static_cast<int32_t>(threadIdx.x) % 32);
  }
}

// The demand of every column. In layout "expert", `starts` becomes the number of rows of the
// experts before it among its 32, and `sums` the number of rows of these 32.
template <typename Params>
__device__ void SumColumns(const Params& params, const PushMemory& shared) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  if (Params::kLayout == Layout::kToken) {
    const int32_t column = threadIdx.x;
    if (column >= p.group.num_ranks) return;
    int32_t before = 0;
    shared.demand[column] = SumRanks(params, shared, column, p.group.rank, before);
    shared.rows[column] = {before, p.capacity};
    shared.starts[column] = 0;
    return;
  }
  ForExperts(params, [&](int32_t i, int32_t r, int32_t, int32_t l) {
    const int32_t lane = threadIdx.x % 32;
    const int32_t column = r * n.num_local + l;
    int32_t padded = 0;
    if (l < n.num_local) {
      int32_t before = 0;
      const int32_t demand = SumRanks(params, shared, column, p.group.rank, before);
      shared.demand[column] = demand;
      shared.rows[column].first = before;
      padded = SizeOfGroup(params, demand);
    }
    int32_t inclusive = padded;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int32_t other = __shfl_up_sync(~0u, inclusive, offset);
      if (lane >= offset) inclusive = plan::AddSizes(inclusive, other, p.capacity);
    }
    const int32_t before = __shfl_up_sync(~0u, inclusive, 1);
    if (l < n.num_local) shared.starts[column] = lane == 0 ? 0 : before;
    if (lane == 31) shared.sums[i] = inclusive;
  });
}

// The rows of one expert: the first, and how many it may keep.
struct ExpertRoom {
  int32_t start, limit;
};

// Where not all rows of rank r fit: see plan::RoomShare. By a warp, whose lanes have the experts
// from `first` on, each the one with its number.
__device__ __noinline__ ExpertRoom RoomOfExperts(const PushParams& params, const int32_t* demand,
                                                 int32_t first) {
  const PlanParams& p = params.plan;
  const int32_t num_local = params.shape.num_local, lane = threadIdx.x % 32;
  const auto size_of = [&params, demand](int32_t l) { return SizeOfGroup(params, demand[l]); };
  const plan::RoomShare share = ShareRoom(num_local, p.alignment, p.capacity, size_of);
  const auto kept_of = [&](int32_t l) {
    return plan::Min(size_of(l), share.LimitOf(l, p.alignment));
  };
  const int32_t l = first + lane, size = l < num_local ? kept_of(l) : 0;
  const int32_t start = SumOfExperts(first, p.capacity, kept_of) + InclusiveWarpSum(size) - size;
  return {start, share.LimitOf(l, p.alignment)};
}

// Where the rows of every expert begin on its rank, and how many are kept.
__device__ void LayOutExpertRows(const PushParams& params, const PushMemory& shared) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  ForExperts(params, [&](int32_t i, int32_t r, int32_t nth, int32_t l) {
    ExpertRoom room{0, p.capacity};
    int32_t all = 0;
#pragma unroll 4
    for (int32_t part = 0; part < n.parts; ++part) {
      if (part == nth) room.start = all;
      all = plan::AddSizes(all, shared.sums[i - nth + part], p.capacity);
    }
    const int32_t column = r * n.num_local + l;
    if (all > p.capacity) {
      room = RoomOfExperts(params, shared.demand + r * n.num_local, 32 * nth);
    } else if (l < n.num_local) {
      room.start += shared.starts[column];
    }
    int32_t dropped = 0;
    if (l < n.num_local) {
      const int32_t demand = shared.demand[column];
      const int32_t count = plan::Min(plan::Min(demand, p.expert_capacity), room.limit);
      shared.starts[column] = room.start;
      shared.rows[column] = {shared.rows[column].first + room.start, room.start + count};
      if (r == p.group.rank && blockIdx.x == 0) {
        p.counts[l] = count;
        p.group_sizes[l] = AlignRows(params, count);
        p.demand[l] = demand;
        dropped = demand - count;
      }
    }
    dropped = __reduce_add_sync(~0u, dropped);
    if (dropped != 0 && threadIdx.x % 32 == 0) atomicAdd(p.num_dropped, dropped);
  });
}

// Layout "token": the first block writes the demand of the local experts. That is also what they
// get, unless tokens were dropped.
__device__ void WriteDemand(const PushParams& params, const PushMemory& shared) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
#pragma unroll 1
  for (int32_t l = threadIdx.x; l < n.num_local; l += kThreads) {
    int32_t before;
    const int32_t column = p.group.num_ranks + p.group.rank * n.num_local + l;
    const int32_t demand = SumRanks(params, shared, column, p.group.rank, before);
    p.demand[l] = p.counts[l] = p.group_sizes[l] = demand;
  }
}

// `slots[].rows.first` becomes the number of entries before the slot in its column. Threads from
// the block's end do the slots, in LayOutSlots too, because threads from its beginning do columns
// meanwhile.
__device__ void SumSlots(const PushParams& params, const PushMemory& shared, Batch batch) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
#pragma unroll 1
  for (int32_t i = kThreads - 1 - threadIdx.x; i < batch.count * n.here; i += kThreads) {
    const int32_t s = n.by_num_here(i);
    const int32_t column = p.group.rank * n.here + i - s * n.here;
    int32_t before = 0;
    SumRanks(params, shared, column, batch.Source(p.group, s), before);
    shared.slots[i].rows.first = before;
  }
}

// Layout "expert": where the entries of the batch's slots go, within the limits of the slots.
__device__ void LayOutSlots(const PushParams& params, const PushMemory& shared, Chunk chunk,
                            Batch batch) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
#pragma unroll 1
  for (int32_t i = kThreads - 1 - threadIdx.x; i < batch.count * n.here; i += kThreads) {
    const int32_t s = n.by_num_here(i);
    const int32_t column = p.group.rank * n.here + i - s * n.here;
    const SlotList list = shared.lists[i];
    const int32_t first = shared.starts[column] + shared.slots[i].rows.first;
    const int32_t limit = plan::Min(first + list.count, shared.rows[column].limit);
    shared.slots[i] = {{first, limit},
                       list.place,
                       (batch.Source(p.group, s) * p.num_tokens + chunk.begin) * p.top_k};
  }
}

}  // namespace
}  // namespace jax_ep::cuda
