// What clock stamps say (core/clock_stamps.cuh): when the phases of an op have passed in each
// block.
#pragma once

#ifdef JAX_EP_CLOCK_STAMPS

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "check_cuda.h"
#include "cuda/core/clock_stamps.cuh"

namespace {

// A phase in one op, in nanoseconds of the GPU's clock.
struct PhaseOfOp {
  struct OfBlock {
    int block;
    uint64_t first, last;  // warp that passed it
  };
  std::vector<OfBlock> blocks;

  bool empty() const { return blocks.empty(); }
  uint64_t First() const {
    uint64_t first = ~uint64_t{0};
    for (const OfBlock& block : blocks) first = std::min(first, block.first);
    return first;
  }
  // When a share of the blocks, at least one, had passed it.
  uint64_t LastOf(double share) const {
    std::vector<uint64_t> last;
    for (const OfBlock& block : blocks) last.push_back(block.last);
    std::sort(last.begin(), last.end());
    return last[static_cast<size_t>(share * static_cast<double>(last.size() - 1))];
  }
  const OfBlock* Of(int block) const {
    for (const OfBlock& of_block : blocks) {
      if (of_block.block == block) return &of_block;
    }
    return nullptr;
  }
};

struct StampedOp {
  PhaseOfOp phases[jax_ep::cuda::kStampedPhases];
};

// Zeros, on the current GPU.
inline jax_ep::cuda::ClockStamps* MakeStamps() {
  void* memory = nullptr;
  CHECK_CUDA(cudaMalloc(&memory, sizeof(jax_ep::cuda::ClockStamps)));
  FillDevice(memory, 0, sizeof(jax_ep::cuda::ClockStamps));
  return static_cast<jax_ep::cuda::ClockStamps*>(memory);
}

// The ops that have stamps, in the order in which they began, which phase 0 says.
inline std::vector<StampedOp> ReadStamps(const jax_ep::cuda::ClockStamps* stamps) {
  using jax_ep::cuda::ClockStamps;
  const auto read = std::make_unique<ClockStamps>();
  CHECK_CUDA(cudaMemcpy(read.get(), stamps, sizeof(ClockStamps), cudaMemcpyDeviceToHost));
  std::vector<StampedOp> ops;
  for (const auto& of_op : read->of) {
    StampedOp op;
    for (int block = 0; block < jax_ep::cuda::kStampedBlocks; ++block) {
      for (int phase = 0; phase < jax_ep::cuda::kStampedPhases; ++phase) {
        const ClockStamps::Passed& passed = of_op[block][phase];
        if (passed.last == 0) continue;
        op.phases[phase].blocks.push_back({block, ~uint64_t{passed.not_first}, passed.last});
      }
    }
    if (!op.phases[0].empty()) ops.push_back(std::move(op));
  }
  std::sort(ops.begin(), ops.end(), [](const StampedOp& a, const StampedOp& b) {
    return a.phases[0].First() < b.phases[0].First();
  });
  return ops;
}

}  // namespace

#endif  // JAX_EP_CLOCK_STAMPS
