// How a rank counts and places its rows, from the choices of all ranks (plan.cu).
//
// The tokens of all ranks make one sequence, in batches of 32. Each warp has neighbouring batches,
// and each block neighbouring warps. So what a warp must know of the batches before its own are
// sums over whole blocks and over earlier warps of its block.
#pragma once

#include <cstdint>

#include "cuda/core/sync.cuh"
#include "cuda/network/plan.h"
#include "cuda/rows/room.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kWarps = kNetworkPlanWarps;
constexpr int kThreads = kWarps * 32;

__device__ PlanMemory MemoryOf(const NetworkPlanParams& p, int32_t index) {
  return PlanMemory(p.network.memory[index], p.network.shape, p.message_bytes);
}

__device__ int32_t Turn(const NetworkPlanParams& p) {
  return static_cast<int32_t>(*MemoryOf(p, p.network.node.rank).num_plans() % 2);
}

struct Sizes {
  int32_t num_ranks, num_local, columns;  // R; L; and one column more, for tokens
  __host__ __device__ explicit Sizes(const NetworkPlanParams& p)
      : num_ranks(p.network.shape.num_hosts * p.network.shape.host_ranks),
        num_local(p.num_experts / num_ranks),
        columns(num_local + 1) {}
};

// The batches of a warp, out of those of all ranks.
struct Batches {
  int32_t of_rank, total, begin, end;
  __device__ Batches(const NetworkPlanParams& p, const Sizes& sizes)
      : of_rank(max((p.num_tokens + 31) / 32, 1)), total(of_rank * sizes.num_ranks) {
    const int32_t num_warps = gridDim.x * kWarps;
    const int32_t each = (total + num_warps - 1) / num_warps;
    begin = plan::Min((blockIdx.x * kWarps + threadIdx.x / 32) * each, total);
    end = plan::Min(begin + each, total);
  }
};

// Counts of rows by column: of the batches of a block, and of those of its warps before each warp.
// Written by CountKernel.
struct Counts {
  int32_t* scratch;
  int32_t columns;
  __device__ int32_t* BeforeWarp(int32_t block, int32_t warp) const {
    return scratch + (int64_t{block} * (kWarps + 1) + warp) * columns;
  }
  __device__ int32_t* OfBlock(int32_t block) const { return BeforeWarp(block, kWarps); }
};

// Where this rank reads a rank's choices.
__device__ const int16_t* ChoicesOf(const NetworkPlanParams& p, int32_t turn, int32_t rank) {
  const int32_t host = rank / p.network.shape.host_ranks;
  const PlanMemory memory = MemoryOf(p, rank % p.network.shape.host_ranks);
  return host == p.network.host ? memory.out(turn, host) : memory.in(turn, host);
}

// The choices of 32 tokens, of which each lane has one.
struct Batch {
  const int16_t* choices;  // [K], of this lane's token, in shared memory
  int32_t first_expert;    // of this rank, as choices count
  uint32_t here;           // bit k: the k-th choice is on this rank

  // The batch of a rank's tokens from `begin` on. `room`, in shared memory, is for 32 * K choices
  // and free. By one warp.
  __device__ Batch(const NetworkPlanParams& p, const Sizes& sizes, const int16_t* of_rank,
                   int32_t begin, int16_t* room)
      : choices(room + threadIdx.x % 32 * p.top_k),
        first_expert(p.network.node.rank * sizes.num_local),
        here(0) {
    constexpr int kPerVector = sizeof(uint4) / sizeof(int16_t);
    const int32_t lane = threadIdx.x % 32, num_tokens = plan::Min(32, p.num_tokens - begin);
    // A message has room for whole vectors, and every batch begins with one.
    const int16_t* const from = of_rank + int64_t{begin} * p.top_k;
    for (int32_t at = lane * kPerVector; at < num_tokens * p.top_k; at += 32 * kPerVector) {
      *reinterpret_cast<uint4*>(room + at) = ptx::LoadCacheGlobal(from + at);
    }
    __syncwarp();
    for (int32_t k = 0; lane < num_tokens && k < p.top_k; ++k) {
      const int32_t local = Local(k);
      if (local >= 0 && local < sizes.num_local) here |= 1u << k;
    }
  }

  // The local expert of a choice that is on this rank.
  __device__ int32_t Local(int32_t k) const { return choices[k] - first_expert; }
};

// Calls `visit(k)` for each bit of a mask.
template <typename Visit>
__device__ __forceinline__ void ForBits(uint32_t mask, Visit&& visit) {
  for (; mask != 0; mask &= mask - 1) visit(__ffs(static_cast<int>(mask)) - 1);
}

// Shared memory of a block of PlaceKernel.
struct PlaceMemory {
  int32_t* demand;  // [columns]
  int32_t* counts;  // [L], kept
  int32_t* sizes;   // [L], with padding
  int32_t* starts;  // [L], first rows
  // Of each warp:
  int16_t* room;     // [32, K]
  int32_t* running;  // [columns], rows so far, of all ranks
  uint32_t* lanes;   // [L], lanes whose token wants the expert; zero between batches

  __device__ PlaceMemory(char* memory, const Sizes& s, int32_t top_k, int32_t warp) {
    room = reinterpret_cast<int16_t*>(memory) + warp * 32 * top_k;
    demand = reinterpret_cast<int32_t*>(memory + int64_t{kWarps} * 32 * top_k * sizeof(int16_t));
    counts = demand + s.columns;
    sizes = counts + s.num_local;
    starts = sizes + s.num_local;
    running = starts + s.num_local + warp * (s.columns + s.num_local);
    lanes = reinterpret_cast<uint32_t*>(running + s.columns);
  }
};

size_t PlaceSharedBytes(const NetworkPlanParams& p) {
  const Sizes s(p);
  return sizeof(int16_t) * kWarps * 32 * p.top_k +
         sizeof(int32_t) * (s.columns + 3 * s.num_local + kWarps * (s.columns + s.num_local));
}

// Where the rows of each expert begin, and how many it keeps: see plan::RoomShare. By one warp.
__device__ void LayOutRows(const NetworkPlanParams& p, const Sizes& sizes, const PlaceMemory& m) {
  const int32_t lane = threadIdx.x % 32;
  const auto size_of = [demand = m.demand, alignment = p.alignment, capacity = p.capacity,
                        bound = p.expert_capacity](int32_t l) {
    return plan::GroupSize(plan::Min(demand[l], bound), alignment, capacity);
  };
  const plan::RoomShare share = ShareRoom(sizes.num_local, p.alignment, p.capacity, size_of);
  int32_t start = 0;
  for (int32_t first = 0; first < sizes.num_local; first += 32) {
    const int32_t l = first + lane;
    int32_t count = 0;
    if (l < sizes.num_local) {
      const int32_t wanted = plan::Min(m.demand[l], p.expert_capacity);
      count = plan::Min(wanted, share.LimitOf(l, p.alignment));
    }
    const int32_t size = plan::RoundUp(count, p.alignment);
    int32_t up_to = size;
    for (int32_t offset = 1; offset < 32; offset *= 2) {
      const int32_t other = __shfl_up_sync(~0u, up_to, offset);
      if (lane >= offset) up_to += other;
    }
    if (l < sizes.num_local) {
      m.starts[l] = start + up_to - size;
      m.counts[l] = count;
      m.sizes[l] = size;
    }
    start += __shfl_sync(~0u, up_to, 31);
  }
}

// Lays out this rank's rows, the same in every block, and finds the rows before each warp's.
__device__ void LayOut(const NetworkPlanParams& p, const Sizes& sizes, const Counts& counts,
                       const PlaceMemory& m) {
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int32_t* const before_block = m.running - warp * (sizes.columns + sizes.num_local);  // warp 0's
  for (int32_t l = threadIdx.x; l < sizes.columns; l += kThreads) {
    constexpr int kAtOnce = 32;  // loads in flight
    int32_t before = 0, all = 0;
    for (int32_t first = 0; first < gridDim.x; first += kAtOnce) {
      int32_t count[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        count[i] = first + i < gridDim.x ? __ldcg(counts.OfBlock(first + i) + l) : 0;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        all += count[i];
        if (first + i < blockIdx.x) before += count[i];
      }
    }
    m.demand[l] = all;
    before_block[l] = before;
  }
  for (int32_t l = lane; l < sizes.num_local; l += 32) m.lanes[l] = 0;
  __syncthreads();
  if (p.layout == plan::Layout::kToken) {
    for (int32_t l = threadIdx.x; l < sizes.num_local; l += kThreads) m.counts[l] = 0;
  } else if (warp == kWarps - 1) {
    LayOutRows(p, sizes, m);
  }
#pragma unroll 4
  for (int32_t l = lane; warp > 0 && l < sizes.columns; l += 32) {
    m.running[l] = before_block[l] + __ldcg(counts.BeforeWarp(blockIdx.x, warp) + l);
  }
  __syncthreads();
}

// The sum over the lanes before this one; `all` becomes that over all lanes.
__device__ __forceinline__ int32_t SumBefore(int32_t value, int32_t& all) {
  const int32_t lane = threadIdx.x % 32;
  int32_t up_to = value;
  for (int32_t offset = 1; offset < 32; offset *= 2) {
    const int32_t other = __shfl_up_sync(~0u, up_to, offset);
    if (lane >= offset) up_to += other;
  }
  all = __shfl_sync(~0u, up_to, 31);
  return up_to - value;
}

// Entries before this warp's batches: the rows so far that are kept.
__device__ int32_t FirstEntryOfWarp(const NetworkPlanParams& p, const Sizes& sizes,
                                    const PlaceMemory& m) {
  if (p.layout == plan::Layout::kToken) return plan::Min(m.running[sizes.num_local], p.capacity);
  int32_t sum = 0, all;
  for (int32_t l = threadIdx.x % 32; l < sizes.num_local; l += 32) {
    sum += plan::Min(m.running[l], m.counts[l]);
  }
  SumBefore(sum, all);
  return all;
}

// What all lanes know of a batch that is placed.
struct Position {
  int32_t rank, begin;  // the first token
  int32_t entry;        // the first one
};

__device__ __forceinline__ void WriteEntry(const NetworkPlanParams& p, const Position& at,
                                           int32_t entry, int32_t row, int32_t k) {
  const int32_t token = at.begin + static_cast<int32_t>(threadIdx.x % 32);
  p.recv_token[entry] = token;
  p.recv_row[entry] = row;
  p.recv_src[row] = plan::EncodeSource(p.layout, {at.rank, token, k}, p.num_tokens, p.top_k);
}

// Places the rows of a batch, layout "token". Returns the number of entries.
__device__ int32_t PlaceTokens(const NetworkPlanParams& p, const Sizes& sizes, const PlaceMemory& m,
                               const Batch& batch, const Position& at) {
  const int32_t lane = threadIdx.x % 32;
  const uint32_t earlier = (1u << lane) - 1, here = __ballot_sync(~0u, batch.here != 0);
  int32_t& running = m.running[sizes.num_local];
  int32_t row = plan::kNone;
  if (batch.here != 0) row = plan::TokenRow(p.capacity, running + __popc(here & earlier));
  const uint32_t kept = __ballot_sync(~0u, row != plan::kNone);
  if (row != plan::kNone) {
    WriteEntry(p, at, at.entry + __popc(kept & earlier), row, 0);
    ForBits(batch.here, [&](int32_t k) {
      const int32_t local = batch.Local(k);
      p.expert_idx[int64_t{row} * p.top_k + k] = local;
      atomicAdd(&m.counts[local], 1);
    });
  }
  __syncwarp();
  if (lane == 0) running += __popc(here);
  __syncwarp();
  return __popc(kept);
}

// The same in layout "expert".
__device__ int32_t PlaceChoices(const NetworkPlanParams& p, const PlaceMemory& m,
                                const Batch& batch, const Position& at) {
  const uint32_t earlier = (1u << threadIdx.x % 32) - 1;
  ForBits(batch.here,
          [&](int32_t k) { atomicOr(&m.lanes[batch.Local(k)], 1u << threadIdx.x % 32); });
  __syncwarp();
  const auto row_of = [&](int32_t local) {
    const int32_t position = m.running[local] + __popc(m.lanes[local] & earlier);
    return plan::ExpertRow(m.starts[local], m.counts[local], position);
  };
  uint32_t kept = 0;
  ForBits(batch.here, [&](int32_t k) {
    if (row_of(batch.Local(k)) != plan::kNone) kept |= 1u << k;
  });
  int32_t num_entries;
  const int32_t first = at.entry + SumBefore(__popc(kept), num_entries);
  ForBits(kept, [&](int32_t k) {
    const int32_t local = batch.Local(k);
    int32_t entry = first;  // after those of the token's experts with lower numbers
    ForBits(kept, [&](int32_t j) { entry += batch.Local(j) < local ? 1 : 0; });
    WriteEntry(p, at, entry, row_of(local), k);
  });
  // The lowest lane that wants an expert counts for all.
  uint32_t counted = 0;
  ForBits(batch.here, [&](int32_t k) {
    if ((m.lanes[batch.Local(k)] & earlier) == 0) counted |= 1u << k;
  });
  __syncwarp();  // all have read
  ForBits(counted, [&](int32_t k) {
    const int32_t local = batch.Local(k);
    m.running[local] += __popc(m.lanes[local]);
    m.lanes[local] = 0;  // a choice that the token has made twice adds nothing more
  });
  __syncwarp();
  return num_entries;
}

// Places the rows of a warp's batches.
__device__ void PlaceRows(const NetworkPlanParams& p, const Sizes& sizes, const PlaceMemory& m,
                          int32_t turn) {
  const Batches batches(p, sizes);
  Position at{0, 0, FirstEntryOfWarp(p, sizes, m)};
  for (int32_t i = batches.begin; i < batches.end; ++i) {
    at.rank = i / batches.of_rank;
    at.begin = (i - at.rank * batches.of_rank) * 32;
    if (at.begin == 0 && threadIdx.x % 32 == 0) p.recv_start[at.rank] = at.entry;
    const Batch batch(p, sizes, ChoicesOf(p, turn, at.rank), at.begin, m.room);
    if (__any_sync(~0u, batch.here != 0)) {
      at.entry += p.layout == plan::Layout::kToken ? PlaceTokens(p, sizes, m, batch, at)
                                                   : PlaceChoices(p, m, batch, at);
    }
    __syncwarp();  // the room is free
    if (i + 1 == batches.total && threadIdx.x % 32 == 0) {
      p.recv_start[sizes.num_ranks] = at.entry;
    }
  }
  if (p.layout != plan::Layout::kToken) return;
  __syncthreads();  // this block's counts are complete
  for (int32_t l = threadIdx.x; l < sizes.num_local; l += kThreads) {
    if (m.counts[l] != 0) atomicAdd(&p.counts[l], m.counts[l]);
  }
}

}  // namespace
}  // namespace jax_ep::cuda
