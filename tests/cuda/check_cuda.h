// Ends a test program at the first CUDA error; memory of a device that is filled when a call
// returns.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#define CHECK_CUDA(call)                                                                          \
  do {                                                                                            \
    const cudaError_t check_error = (call);                                                       \
    if (check_error != cudaSuccess) {                                                             \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(check_error)); \
      std::exit(1);                                                                               \
    }                                                                                             \
  } while (false)

// Fills memory of the current device. Unlike cudaMemset, which returns before, and which streams
// that do not block (those of ranks) do not wait for, it has done so when it returns.
inline void FillDevice(void* memory, int byte, size_t size) {
  CHECK_CUDA(cudaMemset(memory, byte, size));
  CHECK_CUDA(cudaStreamSynchronize(nullptr));
}
