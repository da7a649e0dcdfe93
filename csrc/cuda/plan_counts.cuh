// Steps of the plan's fast kernel (plan_push.cu) over columns: what each of them has, and where its
// rows begin.
#pragma once

#include <cstdint>

#include "cuda/plan_inbox.cuh"

namespace jax_ep::cuda {
namespace {

__device__ void ClearCells(const PushShape& n, const Shared& shared, int32_t first, int32_t last) {
#pragma unroll 1
  for (int32_t i = first * n.stride + threadIdx.x; i < last * n.stride; i += kThreads) {
    shared.cells[i] = {0, 0};
  }
}

// The place in the list of `count` entries; `num_listed` counts them. Called by whole warps. The
// order in the list does not matter.
__device__ __forceinline__ int32_t PlaceInList(int32_t count, int32_t* num_listed) {
  const int32_t sum = InclusiveWarpSum(count);
  int32_t first = 0;
  if (threadIdx.x % 32 == 31 && sum != 0) first = atomicAdd(num_listed, sum);
  return __shfl_sync(~0u, first, 31) + sum - count;
}

// Gives each cell of the columns what lies before it, by column. `begin(is_last, column, total)`,
// called by whole warps, says where the entries of a column begin; four lanes have a column.
template <typename Begin>
__device__ void SumCells(const PushShape& n, const Shared& shared, int32_t first_column,
                         int32_t last_column, Begin begin) {
  constexpr int kLanes = 4;
  constexpr int kAtOnce = 4;  // loads side by side
  const int32_t part = threadIdx.x % kLanes;
  const int32_t words = (n.words + kLanes - 1) / kLanes;
  const int32_t first = plan::Min(part * words, n.words);
  const int32_t last = plan::Min(first + words, n.words);
#pragma unroll 1
  for (int32_t i = threadIdx.x; i / 32 * 32 < (last_column - first_column) * kLanes;
       i += kThreads) {
    const int32_t column = first_column + i / kLanes;
    Cell* cells = shared.cells + column * n.stride;
    int32_t sum = 0;
    if (column < last_column) {
#pragma unroll 1
      for (int32_t w = first; w < last; w += kAtOnce) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) sum += w + j < last ? __popc(cells[w + j].mask) : 0;
      }
    }
    int32_t inclusive = sum;
#pragma unroll
    for (int offset = 1; offset < kLanes; offset *= 2) {
      const int32_t other = __shfl_up_sync(~0u, inclusive, offset, kLanes);
      if (part >= offset) inclusive += other;
    }
    const bool is_last = part == kLanes - 1 && column < last_column;
    const int32_t total = __shfl_sync(~0u, inclusive, kLanes - 1, kLanes);
    int32_t before = begin(is_last, column, total) + inclusive - sum;
    if (column >= last_column) continue;
#pragma unroll 1
    for (int32_t w = first; w < last; w += kAtOnce) {
      uint32_t masks[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) masks[j] = w + j < last ? cells[w + j].mask : 0;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (w + j < last) cells[w + j].before = before;
        before += __popc(masks[j]);
      }
    }
  }
}

// Two numbers below 2^16 in one.
__device__ __forceinline__ uint32_t Halves(int32_t low, int32_t high) {
  return static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
}

// This block's counts, to all ranks.
__device__ void SendCounts(const PushParams& params, const Shared& shared, uint64_t epoch) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.group.num_ranks * n.quads; i += kThreads) {
    const int32_t nth = n.by_quads(i);
    const int32_t quad = i - nth * n.quads;
    int r = p.group.rank + 1 + nth;
    if (r >= p.group.num_ranks) r -= p.group.num_ranks;
    const int4 counts = reinterpret_cast<const int4*>(shared.sent)[quad];
    SendPair(CountsOf(*p.group.peers[r], n, epoch, p.group.rank, blockIdx.x) + 2 * quad, epoch,
             Halves(counts.x, counts.y), Halves(counts.z, counts.w));
  }
}

// The counts of all ranks.
__device__ bool TakeCounts(const PushParams& params, const Shared& shared, uint64_t epoch) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.group.num_ranks * n.quads; i += kThreads) {
    const int source = n.by_quads(i);
    const int32_t quad = i - source * n.quads;
    const uint64_t* from = CountsOf(Own(p.group), n, epoch, source, 0) + 2 * quad;
    Pair pairs[kBlocks];
    for (Deadline deadline;;) {
      bool all = true;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) pairs[b].Load(from + b * 2 * n.quads);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) all = all && pairs[b].IsOf(epoch);
      if (all) break;
      if (!pairs[0].Continue(deadline, p.group, epoch, source)) return false;
    }
    int32_t total[4] = {}, before[4] = {};
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const uint32_t words[2] = {pairs[b].FirstData(), pairs[b].SecondData()};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int32_t count = words[j / 2] >> (j % 2 * 16) & 0xffff;
        total[j] += count;
        before[j] += b < blockIdx.x ? count : 0;
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int32_t column = 4 * quad + j;
      if (column < n.columns) {
        shared.totals[source * n.columns + column] = Halves(total[j], before[j]);
      } else if (column == n.columns && source == p.group.rank && blockIdx.x == 0) {
        *p.num_invalid = total[j];
      }
    }
  }
  return true;
}

// Entries of all ranks in `column`; `before` gets those of the ranks before `source`, and of the
// blocks before this one there.
__device__ __forceinline__ int32_t SumRanks(const PushParams& params, const Shared& shared,
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

// a + b, cut at the capacity, which neither is above.
__device__ __forceinline__ int32_t AddRows(const PlanParams& p, int32_t a, int32_t b) {
  const uint32_t sum = static_cast<uint32_t>(a) + static_cast<uint32_t>(b);
  return static_cast<int32_t>(min(sum, static_cast<uint32_t>(p.capacity)));
}

__device__ __forceinline__ int32_t AlignRows(const PushParams& params, int32_t count) {
  const int32_t alignment = params.plan.alignment;
  const int32_t past = count - params.shape.by_alignment(count) * alignment;
  return past == 0 ? count : count + (alignment - past);
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

// What every column of rows is asked for. In layout "expert" `starts` becomes how many rows the
// experts before it have among its 32, and `sums` how many these have.
template <typename Params>
__device__ void SumColumns(const Params& params, const Shared& shared) {
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
      const int32_t wanted = plan::Min(demand, p.expert_capacity);
      padded = plan::Min(AlignRows(params, wanted), p.capacity);
    }
    int32_t inclusive = padded;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int32_t other = __shfl_up_sync(~0u, inclusive, offset);
      if (lane >= offset) inclusive = AddRows(p, inclusive, other);
    }
    const int32_t before = __shfl_up_sync(~0u, inclusive, 1);
    if (l < n.num_local) shared.starts[column] = lane == 0 ? 0 : before;
    if (lane == 31) shared.sums[i] = inclusive;
  });
}

// Where the rows of every expert begin on its rank, and how many are kept: see LayOutExperts. Once
// the groups reach the capacity, a multiple of the alignment, nothing is left for the rest: so a
// start is the sum of the sizes before it, cut at the capacity.
__device__ void LayOutExpertRows(const PushParams& params, const Shared& shared) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  ForExperts(params, [&](int32_t i, int32_t r, int32_t nth, int32_t l) {
    int32_t start = 0;
#pragma unroll 4
    for (int32_t part = i - nth; part < i; ++part) start = AddRows(p, start, shared.sums[part]);
    int32_t dropped = 0;
    if (l < n.num_local) {
      const int32_t column = r * n.num_local + l;
      start = AddRows(p, start, shared.starts[column]);
      const int32_t demand = shared.demand[column];
      const int32_t count = plan::Min(plan::Min(demand, p.expert_capacity), p.capacity - start);
      shared.starts[column] = start;
      shared.rows[column] = {shared.rows[column].first + start, start + count};
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

// Layout "token": the first block writes what the local experts are asked for; it is what they get,
// too, unless tokens were dropped.
__device__ void WriteDemand(const PushParams& params, const Shared& shared) {
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

// Where the listed entries go.
template <typename Params>
__device__ void LayOutSlots(const Params& params, const Shared& shared, Chunk chunk, Batch batch) {
  const PlanParams& p = params.plan;
  const PushShape& n = params.shape;
  const int32_t entries = Params::kLayout == Layout::kToken ? 1 : p.top_k;  // of a token
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < batch.count * n.here; i += kThreads) {
    const int32_t s = Params::kLayout == Layout::kToken ? i : n.by_num_local(i);
    const int32_t column = p.group.rank * n.here + i - s * n.here;
    const int source = batch.Source(p.group, s);
    int32_t before = 0;
    SumRanks(params, shared, column, source, before);
    shared.slots[i] = {shared.starts[column] + before - shared.firsts[i], shared.rows[column].limit,
                       (source * p.num_tokens + chunk.begin) * entries, s * n.chunk * entries};
  }
}

}  // namespace
}  // namespace jax_ep::cuda
