// How the warps of a dispatch wait for rows that are cast beside it (cast.h).
#pragma once

#include <cstdint>

#include "cuda/core/sync.cuh"
#include "cuda/node/dispatch.h"

namespace jax_ep::cuda {

// Waits until a peer has told that a chunk is cast; after a failure it returns at once.
__device__ __forceinline__ void WaitChunk(const DispatchParams& p, OpNumbers op, int32_t rank,
                                          int32_t chunk) {
  const uint64_t& word = Own(p.group).ring_ready[rank][chunk];
  const uint64_t expected = RingWord(chunk, op.epoch);
  for (Deadline deadline; kMutation != kWithoutCast;) {
    const uint64_t seen = ptx::LoadAcquireSystem(&word);
    if (seen == expected) return;
    if (!deadline.Continue(p.group, WordKind::kCastChunk, rank, expected, seen)) return;
  }
}

// Waits until a peer has cast a token, so that generic loads and bulk loads find it. After a
// failure it returns at once. Flags take long to load, and fences take time, so `seen` has the
// chunks of each rank that a warp of this block has waited for, and then those of this warp. By one
// lane.
__device__ __forceinline__ void WaitCast(const DispatchParams& p, OpNumbers op, uint32_t* seen,
                                         int32_t rank, int32_t token) {
  const int32_t chunk = token / p.cast_chunk;
  uint32_t* by_warp = seen + (1 + threadIdx.x / 32) * kMaxRanks;
  if ((by_warp[rank] >> chunk & 1) != 0) return;
  const bool by_block = (*static_cast<volatile uint32_t*>(&seen[rank]) >> chunk & 1) != 0;
  if (!by_block) WaitChunk(p, op, rank, chunk);
  __threadfence_block();
  if (!by_block) atomicOr(&seen[rank], 1u << chunk);
  by_warp[rank] |= 1u << chunk;
  ptx::FenceProxyAsyncGlobal();
}

}  // namespace jax_ep::cuda
