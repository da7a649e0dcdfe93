// How the experts of a rank share its room: plan::RoomShare, by one warp.
#pragma once

#include <cstdint>

#include "plan/routing.h"

namespace jax_ep::cuda {

// The sum over the lanes of a warp, as plan::AddSizes adds.
__device__ __forceinline__ int32_t SumSizes(int32_t size, int32_t capacity) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    size = plan::AddSizes(size, __shfl_xor_sync(~0u, size, offset), capacity);
  }
  return size;
}

// The sum of `size_of(l)` over the first `count` experts. By all lanes.
template <typename SizeOf>
__device__ __forceinline__ int32_t SumOfExperts(int32_t count, int32_t capacity, SizeOf&& size_of) {
  int32_t sum = 0;
  for (int32_t l = threadIdx.x % 32; l < count; l += 32) {
    sum = plan::AddSizes(sum, size_of(l), capacity);
  }
  return SumSizes(sum, capacity);
}

// `size_of(l)` is plan::GroupSize of local expert l. Where all groups fit, the search ends after
// its first sum. By all lanes; the same in all of them. `size_of` has to capture values: what it
// refers to would lie in local memory in the whole kernel, and be reached by generic loads.
template <typename SizeOf>
__device__ __noinline__ plan::RoomShare ShareRoom(int32_t num_local, int32_t alignment,
                                                  int32_t capacity, SizeOf size_of) {
  const auto sum_at = [&](int32_t level) {
    return SumOfExperts(num_local, capacity, [&](int32_t l) { return min(size_of(l), level); });
  };
  if (sum_at(capacity + 1) <= capacity) return {capacity, 0};
  int32_t low = 0, high = capacity / alignment;  // in groups of the alignment; `low` fits
  while (low < high) {
    const int32_t middle = high - (high - low) / 2;
    if (sum_at(middle * alignment) <= capacity) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  plan::RoomShare share{low * alignment, 0};
  int32_t left = (capacity - sum_at(share.level)) / alignment;
  for (int32_t first = 0; left > 0 && first < num_local; first += 32) {
    const int32_t l = first + static_cast<int32_t>(threadIdx.x % 32);
    uint32_t more =
        __ballot_sync(~0u, l < num_local && size_of(min(l, num_local - 1)) > share.level);
    for (; left > 0 && more != 0; more &= more - 1, --left) {
      share.cut = first + __ffs(static_cast<int>(more));
    }
  }
  return share;
}

}  // namespace jax_ep::cuda
