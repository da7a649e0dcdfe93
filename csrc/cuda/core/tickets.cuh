// Work that warps take when they are ready for it.
//
// SMs are not equally fast. Some share a way to memory, and how many do so depends on where the
// blocks run. With equal shares of the work all would wait for the slowest. So shares are not
// fixed: a warp that is ready takes the next item.
#pragma once

#include <cstdint>

#include "cuda/core/sync.cuh"

namespace jax_ep::cuda {

// Hands out the numbers 0, 1, 2, ... of the running kernel, each to one warp of this rank. EndOp
// resets them.
class Tickets {
 public:
  __device__ explicit Tickets(const GroupParams& group) : group_(group), num_given_(0) { Ask(); }

  // The first tickets, one for each warp, are assigned beforehand. Their work waits until the block
  // runs, so use this only for work that nobody waits for.
  __device__ Tickets(const GroupParams& group, uint32_t warp, uint32_t num_warps)
      : group_(group), next_(warp), num_given_(num_warps) {}

  // The next ticket, the same in all lanes. Called by all lanes together.
  __device__ uint32_t Take() {
    const uint32_t ticket = __shfl_sync(~0u, next_, 0);
    Ask();
    return ticket;
  }

 private:
  // The answer is on its way when this returns.
  __device__ void Ask() {
    if (threadIdx.x % 32 == 0) next_ = num_given_ + atomicAdd(&Own(group_).tickets, 1u);
  }

  const GroupParams& group_;
  uint32_t next_;
  uint32_t num_given_;
};

}  // namespace jax_ep::cuda
