// Teams: the warps of a block that go through the same chunks together, each doing a share of each.
#pragma once

#include <cstdint>

#include "cuda/core/sync.cuh"
#include "plan/routing.h"

namespace jax_ep::cuda {

// One warp of a team, at most 32. All methods are called by all of its lanes. The first warp tells
// others what the team has done. It does a share like the rest, or is their teller only, if telling
// would make it late.
struct TeamMember {
  int32_t warp;  // of the team
  int32_t num_warps;
  uint32_t* done;  // [num_warps] in shared memory: chunks that each warp has done; zeros at first
  int32_t worker;  // of those that do shares; -1: none
  int32_t num_workers;
  int32_t next;  // the worker whose turn is the next item
  uint32_t num_done = 0;

  __device__ TeamMember(int32_t warp, int32_t num_warps, uint32_t* done, bool only_tells = false)
      : warp(warp),
        num_warps(num_warps),
        done(done),
        worker(only_tells ? warp - 1 : warp),
        num_workers(only_tells ? num_warps - 1 : num_warps),
        next(worker) {}

  // A warp on its own.
  __device__ static TeamMember Alone() { return {0, 1, nullptr}; }

  // The first of `count` items that this warp takes; its others follow in steps of num_workers. The
  // warps take turns through all items of all chunks, so that each gets as many as the others.
  __device__ int32_t TakeShare(int32_t count) {
    if (worker < 0) return count;
    const int32_t first = next;
    next = (next + num_workers - count % num_workers) % num_workers;
    return first;
  }
  // The number of items in a share that begins with `first`.
  __device__ int32_t ShareOf(int32_t count, int32_t first) const {
    return first < count ? (count - first - 1) / num_workers + 1 : 0;
  }

  // Calls `visit(row, i)` for this warp's share of `count * per_row` items: the i-th of each row.
  // In each lane, with other items; in all lanes together, with `row` at most `count` - 1 and `i`
  // negative where there are no more.
  template <typename Visit>
  __device__ void ForItems(int32_t count, int32_t per_row, Visit&& visit) const {
    const int32_t total = worker < 0 ? 0 : count * per_row;
#pragma unroll 2
    for (int32_t base = worker * 32; base < total; base += num_workers * 32) {
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
    // In the block this is enough: what the first warp releases to the system then includes it.
    __threadfence_block();
    if (warp != 0) {
      if (lane == 0) atomicExch(&done[warp], num_done);
      return false;
    }
    const bool waits = lane > 0 && lane < num_warps && kMutation != kWithoutTeam;
    for (uint32_t polls = 1; waits && ok && atomicAdd(&done[lane], 0u) < num_done; ++polls) {
      if (polls % 32 == 0) ok = ptx::LoadAcquireSystem(&Own(group).failed) == 0u;
      __nanosleep(20);
    }
    __threadfence_block();
    ok = __all_sync(~0u, ok);
    __syncwarp();
    return ok;
  }
};

}  // namespace jax_ep::cuda
