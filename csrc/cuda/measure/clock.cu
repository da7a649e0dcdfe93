// One thread that reads the clock.

#include "cuda/core/ptx.cuh"
#include "cuda/measure/clock.h"

namespace jax_ep::cuda {
namespace {

__global__ void ClockKernel(uint32_t* time) {
  const uint64_t now = ptx::GlobalTimer();
  time[0] = static_cast<uint32_t>(now);
  time[1] = static_cast<uint32_t>(now >> 32);
}

}  // namespace

cudaError_t LoadClock() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, ClockKernel);
}

cudaError_t LaunchClock(uint32_t* time, cudaStream_t stream) {
  ClockKernel<<<1, 1, 0, stream>>>(time);
  return cudaGetLastError();
}

}  // namespace jax_ep::cuda
