// The GPU's clock, read in the order of a stream. Benchmarks time ops with it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_ep::cuda {

// Writes the time at which the kernel runs, in nanoseconds, to `time` ([2] uint32, low word first).
// All SMs of a GPU share the clock. Clocks of several GPUs are not synchronised.
cudaError_t LaunchClock(uint32_t* time, cudaStream_t stream);

cudaError_t LoadClock();

}  // namespace jax_ep::cuda
