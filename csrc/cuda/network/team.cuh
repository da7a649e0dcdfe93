// Teams: the warps of a block that go through the same chunks together, each doing a share of each.
#pragma once

#include <cstdint>

#include "cuda/core/sync.cuh"
#include "plan/routing.h"

namespace jax_ep::cuda {

// One warp of a team, at most 32. All methods are called by all of its lanes.
struct TeamMember {
  int32_t warp;  // of the team
  int32_t num_warps;
  uint32_t* done;  // [num_warps] in shared memory: chunks that each warp has done; zeros at first
  uint32_t num_done = 0;
  int32_t next = 0;  // where the next share begins, after `warp`

  __device__ TeamMember(int32_t warp, int32_t num_warps, uint32_t* done)
      : warp(warp), num_warps(num_warps), done(done), next(warp) {}

  // A warp on its own.
  __device__ static TeamMember Alone() { return {0, 1, nullptr}; }

  // The first of `count` items that this warp takes; its others follow in steps of num_warps. The
  // warps take turns through all items of all chunks, so that each gets as many as the others.
  __device__ int32_t TakeShare(int32_t count) {
    const int32_t first = next;
    next = (next + num_warps - count % num_warps) % num_warps;
    return first;
  }
  // The number of items in a share that begins with `first`.
  __device__ int32_t ShareOf(int32_t count, int32_t first) const {
    return first < count ? (count - first - 1) / num_warps + 1 : 0;
  }

  // Calls `visit(row, i)` for this warp's share of `count * per_row` items: the i-th of each row.
  // In each lane, with other items; in all lanes together, with `row` at most `count` - 1 and `i`
  // negative where there are no more.
  template <typename Visit>
  __device__ void ForItems(int32_t count, int32_t per_row, Visit&& visit) const {
    const int32_t total = count * per_row;
#pragma unroll 2
    for (int32_t base = warp * 32; base < total; base += num_warps * 32) {
      const int32_t item = base + static_cast<int32_t>(threadIdx.x % 32);
      const int32_t row = plan::Min(item / per_row, count - 1);
      visit(row, item < total ? item - row * per_row : plan::kNone);
    }
  }

  // Called after each chunk, in the same order by all warps of a team. In the first warp it returns
  // true once all warps have come as far. That warp may then tell others what the team has read and
  // written, by generic accesses and by bulk copies that the warps have waited for. In the other
  // warps it returns false at once. If the group has failed, it returns false in the first warp
  // too, and `ok` is false.
  __device__ bool IsTeller(const GroupParams& group, bool& ok) {
    ++num_done;
    const int32_t lane = threadIdx.x % 32;
    ptx::FenceProxyAsyncGlobal();
    __syncwarp();
    ptx::FenceAcquireReleaseSystem();
    if (warp != 0) {
      if (lane == 0) atomicExch(&done[warp], num_done);
      return false;
    }
    const bool waits = lane > 0 && lane < num_warps && kMutation != kWithoutTeam;
    while (waits && ok && atomicAdd(&done[lane], 0u) < num_done) {
      ok = ptx::LoadAcquireSystem(&Own(group).failed) == 0u;
      __nanosleep(20);
    }
    ptx::FenceAcquireReleaseSystem();
    ok = __all_sync(~0u, ok);
    __syncwarp();
    return ok;
  }
};

}  // namespace jax_ep::cuda
