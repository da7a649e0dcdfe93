// Replaces csrc/cuda/network/net.cuh: the same functions, on the emulator's network.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "network.h"

namespace jax_ep::cuda::net {

inline void PutAndSignal(void* to, const void* from, size_t bytes, uint64_t* signal, uint64_t value,
                         int pe) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) emulator::Put(to, from, bytes, signal, value, pe);
  __syncwarp();
}

inline void PutAlone(void* to, const void* from, size_t bytes, int pe) {
  PutAndSignal(to, from, bytes, nullptr, 0, pe);
}

inline void Signal(uint64_t* signal, uint64_t value, int pe) {
  emulator::SometimesYield(2);
  emulator::PutSignal(signal, value, pe);
}

inline void Accept(uint64_t* signal, uint64_t value) {
  if (*static_cast<volatile uint64_t*>(signal) != value) emulator::Abort("a signal has changed");
}

}  // namespace jax_ep::cuda::net
