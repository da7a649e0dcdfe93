// When the phases of an op pass, for measurements: clock stamps in builds with JAX_EP_CLOCK_STAMPS,
// nothing in all others. tests/cuda/phases.cuh reads them.
#pragma once

#include <cstdint>

#include "cuda/core/group_params.h"
#include "cuda/core/ptx.cuh"

namespace jax_ep::cuda {

constexpr int kStampedOps = 64;
constexpr int kStampedBlocks = 256;  // the most of an op
constexpr int kStampedPhases = 16;

// The stamps of one kernel of a rank, zeros before it runs. Those of an op have its epoch modulo
// kStampedOps.
struct ClockStamps {
  // When the first and the last warp of a block passed a phase, in nanoseconds of the GPU's clock.
  // The first is stored as its complement, so that the largest value counts of both.
  struct Passed {
    unsigned long long not_first, last;
  };
  Passed of[kStampedOps][kStampedBlocks][kStampedPhases];
};

// The clock, for a stamp that is stored once the epoch is known.
__device__ __forceinline__ uint64_t StampTime([[maybe_unused]] const GroupParams& group) {
#ifdef JAX_EP_CLOCK_STAMPS
  if (group.stamps == nullptr) return 0;
  asm volatile("" ::: "memory");  // no access moves over the reading
  const uint64_t now = ptx::GlobalTimer();
  asm volatile("" ::: "memory");
  return now;
#else
  return 0;
#endif
}

// This warp has passed the phase at that time. Its first lane says so.
template <typename Phase>
__device__ __forceinline__ void StampClockAt([[maybe_unused]] const GroupParams& group,
                                             [[maybe_unused]] uint64_t epoch,
                                             [[maybe_unused]] Phase phase,
                                             [[maybe_unused]] uint64_t time) {
#ifdef JAX_EP_CLOCK_STAMPS
  if (group.stamps == nullptr || threadIdx.x % 32 != 0) return;
  auto& passed = group.stamps->of[epoch % kStampedOps][blockIdx.x][static_cast<int>(phase)];
  atomicMax(&passed.not_first, ~static_cast<unsigned long long>(time));
  atomicMax(&passed.last, static_cast<unsigned long long>(time));
#endif
}

// The same for now.
template <typename Phase>
__device__ __forceinline__ void StampClock(const GroupParams& group, uint64_t epoch, Phase phase) {
  StampClockAt(group, epoch, phase, StampTime(group));
}

}  // namespace jax_ep::cuda
