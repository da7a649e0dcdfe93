// An op that is launched behind a plan and may begin before the plan ends (launch.cuh). The plan
// has begun the channel for both, and leaves it to this op to end both.
#pragma once

#include <cstdint>

#include "cuda/core/group_params.h"
#include "cuda/core/ptx.cuh"
#include "cuda/core/sync.cuh"
#include "cuda/core/test_hooks.cuh"

namespace jax_ep::cuda {

// BeginOp of such an op.
__device__ __forceinline__ OpNumbers BeginBehindPlan(const GroupParams& group) {
  const OpNumbers plan = NumbersOfOp(group);
  return {plan.epoch + 1, plan.publication};
}

// Waits, in such an op, until all peers have begun the plan before it, of tag `plan_tag`. So they
// have ended all ops before that, which may have waited for words that lie where this op publishes.
// False in all threads once the group has failed. Called by all threads of a block.
__device__ inline bool WaitPlansBegun(const GroupParams& group, uint64_t epoch, uint32_t plan_tag) {
  const uint64_t plan = epoch - 1;
  bool begun = true;
  for (int r = threadIdx.x; begun && r < group.num_ranks; r += blockDim.x) {
    const uint64_t& flag = Own(group).arrival[plan % 2][r].value;
    for (Deadline deadline; begun && kMutation != kWithoutPlansBegun;) {
      const uint64_t seen = ptx::LoadAcquireSystem(&flag);
      if (seen >> kTagBits >= plan) break;
      begun = deadline.Continue(group, WordKind::kArrivalFlag, r, FlagValue(plan, plan_tag), seen);
    }
  }
  return __syncthreads_and(begun);
}

// Tells such an op that this block of the plan has written its results, or poison. Called by all
// threads of the block.
__device__ inline void TellPlanWritten(const GroupParams& group) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  atomicAdd(&Own(group).plan_blocks, 1u);
}

// Waits, in such an op, until all of the plan's `num_blocks` have told. False in all threads if the
// group has failed by then. Called by all threads of a block.
__device__ inline bool WaitPlanWritten(const GroupParams& group, uint32_t num_blocks) {
  bool ok = true;
  if (threadIdx.x == 0 && kMutation != kWithoutPlan) {
    // The plan ends, whatever happens: its own waits have deadlines.
    while (ptx::LoadAcquireSystem(&Own(group).plan_blocks) < num_blocks) {
    }
    ok = ptx::LoadAcquireSystem(&Own(group).failed) == 0u;
  }
  return __syncthreads_and(ok);
}

}  // namespace jax_ep::cuda
