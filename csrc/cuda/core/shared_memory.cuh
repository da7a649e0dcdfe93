// Shared memory for bulk copies.
//
// By bulk copies, an SM of an H200 stores 59 GB/s out of shared memory at multiples of 128 bytes,
// 57 at multiples of 32, and 33 at other multiples of 16. Where device code is linked (nvlink, as
// NVSHMEM needs it), shared memory whose size a launch gives begins right behind what is static in
// the kernel, at a multiple of 16 bytes, whatever alignment the kernel declares. So such kernels
// declare 16, launch with room for kAlignmentRoom bytes more, and align it.
#pragma once

#include <cstdint>

namespace jax_ep::cuda {

constexpr int kBulkAlignment = 128;
constexpr int kAlignmentRoom = kBulkAlignment - 16;

__device__ __forceinline__ char* AlignForBulk(char* memory) {
  const uint64_t address = reinterpret_cast<uint64_t>(memory);
  return memory + (-address & (kBulkAlignment - 1));
}

}  // namespace jax_ep::cuda
