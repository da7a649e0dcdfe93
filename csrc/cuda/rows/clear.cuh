// Zeros for the unused rows of dispatch.
#pragma once

#include <cstdint>

#include "cuda/core/ptx.cuh"
#include "plan/routing.h"

namespace jax_ep::cuda {

constexpr int kZeroBytes = 8 << 10;

// Calls `visit(row)` for a warp's share of the rows without a source, with the same row in all of
// its lanes. The warp looks at 32 rows at a time: one by one, it would spend more time waiting for
// what tells it that a row has a source than others spend moving rows.
template <typename Visit>
__device__ __forceinline__ void ForEachUnused(const int32_t* recv_src, int32_t capacity,
                                              int32_t warp, int32_t num_warps, Visit&& visit) {
  const int32_t lane = threadIdx.x % 32;
#pragma unroll 2
  for (int64_t base = int64_t{warp} * 32; base < capacity; base += int64_t{num_warps} * 32) {
    const bool is_unused = base + lane < capacity && recv_src[base + lane] < 0;
    for (uint32_t left = __ballot_sync(~0u, is_unused); left != 0; left &= left - 1) {
      visit(base + __ffs(static_cast<int>(left)) - 1);
    }
  }
}

// Clears one warp's share of the rows without a source, a little at a time. Neighbouring rows
// belong to different warps, because unused rows are neighbours.
template <typename Params>
class RowClearer {
 public:
  __device__ RowClearer(const Params& p, const char* zeros, int32_t warp, int32_t num_warps)
      : p_(p), zeros_(zeros), warp_(warp), num_warps_(num_warps) {
    const int32_t share = warp < p.capacity ? (p.capacity - warp - 1) / num_warps + 1 : 0;
    num_steps_ = p.keeps_unused ? 0 : (share + 31) / 32;
    next_is_unused_ = num_steps_ > 0 && IsUnused(0);
  }

  // Goes on until `done` of `total` parts of the work are done. The stores are in each lane's
  // current bulk group.
  __device__ void Advance(int64_t done, int64_t total) {
    while (step_ < num_steps_ && step_ * total < done * num_steps_) {
      const int32_t row = RowAt(step_);
      const bool is_unused = next_is_unused_;
      next_is_unused_ = IsUnused(++step_);  // loaded before it is needed
      if (!is_unused) continue;
      char* target = static_cast<char*>(p_.rows) + row * p_.row_stride;
      for (int32_t offset = 0; offset < p_.row_bytes; offset += kZeroBytes) {
        ptx::BulkStore(target + offset, zeros_, plan::Min(kZeroBytes, p_.row_bytes - offset));
      }
    }
  }

 private:
  __device__ int64_t RowAt(int32_t step) const {
    return (int64_t{step} * 32 + threadIdx.x % 32) * num_warps_ + warp_;
  }
  __device__ bool IsUnused(int32_t step) const {
    const int64_t row = RowAt(step);
    return row < p_.capacity && p_.recv_src[row] < 0;
  }

  const Params& p_;
  const char* zeros_;
  int32_t warp_;
  int32_t num_warps_;
  int32_t num_steps_;
  int32_t step_ = 0;
  bool next_is_unused_;
};

}  // namespace jax_ep::cuda
