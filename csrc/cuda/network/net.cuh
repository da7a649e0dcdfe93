// All of NVSHMEM's device interface that the project uses.
//
// A put and its signal are one call: the signal is set at the receiver after the bytes are there.
// Two puts, or a put and a signal of another call, have no order. The network may read the source
// until the receiver has answered, so sources are in the symmetric heap and are written again only
// after that.
#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include <cstddef>
#include <cstdint>

namespace jax_ep::cuda::net {

// Sends `bytes` to the same place of processing element `pe`, which then finds `value` in `signal`.
// Called by all lanes of a warp, after __syncwarp() and a fence of system scope.
__device__ __forceinline__ void PutAndSignal(void* to, const void* from, size_t bytes,
                                             uint64_t* signal, uint64_t value, int pe) {
  nvshmemx_putmem_signal_nbi_warp(to, from, bytes, signal, value, NVSHMEM_SIGNAL_SET, pe);
}

// Sends bytes without a signal. For mutations alone (test_hooks.cuh): NVSHMEM may put a fence
// between the bytes of PutAndSignal and its signal, which would order what the caller sends next,
// too.
__device__ __forceinline__ void PutAlone(void* to, const void* from, size_t bytes, int pe) {
  nvshmemx_putmem_nbi_warp(to, from, bytes, pe);
}

// Sets a word of `pe`. By one thread.
__device__ __forceinline__ void Signal(uint64_t* signal, uint64_t value, int pe) {
  nvshmemx_signal_op(signal, value, NVSHMEM_SIGNAL_SET, pe);
}

// Call it after the signal of a put was seen and before its bytes are read: some transports need
// that.
__device__ __forceinline__ void Accept(uint64_t* signal, uint64_t value) {
  nvshmem_signal_wait_until(signal, NVSHMEM_CMP_EQ, value);
}

}  // namespace jax_ep::cuda::net
