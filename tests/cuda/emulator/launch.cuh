// Replaces csrc/cuda/core/launch.cuh: the same function, on the emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace jax_ep::cuda {

template <typename Params>
cudaError_t LaunchBehind(void (*kernel)(Params), int num_blocks, int num_threads,
                         size_t shared_bytes, cudaStream_t stream, const Params& params) {
  emulator::Launch(kernel, num_blocks, num_threads, shared_bytes, stream, /*early=*/true)(params);
  return cudaGetLastError();
}

}  // namespace jax_ep::cuda
