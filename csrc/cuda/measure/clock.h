// The GPU's clock, read in the order of a stream: what benchmarks time ops with.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_ep::cuda {

// Writes the time at which the kernel runs, in nanoseconds, to `time` ([2] uint32, low word first).
// All SMs of a GPU share the clock; clocks of several GPUs are not set to one another.
cudaError_t LaunchClock(uint32_t* time, cudaStream_t stream);

cudaError_t LoadClock();

}  // namespace jax_ep::cuda
