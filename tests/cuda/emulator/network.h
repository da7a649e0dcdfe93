// A network between processing elements, the worst that NVSHMEM's model allows. Data arrives late,
// in pieces, in any order, and sources are read as late. Only the signal of a put comes after its
// bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

// The symmetric memory of a processing element: the same size on all of them.
void AddHeap(int pe, void* base, size_t size);

// `to` and `signal` are places in the caller's heap, and mean the same places in that of `pe`. A
// put may have no signal (null).
void Put(void* to, const void* from, size_t bytes, uint64_t* signal, uint64_t value, int pe);
void PutSignal(uint64_t* signal, uint64_t value, int pe);

// Delivers all parts that are due. By the device's thread.
void AdvanceNetwork();

// Payload that has been delivered so far, without signals.
uint64_t BytesCarried();

// JAX_EP_EMULATOR_MUTATION: the network breaks the model and sets signals at once.
constexpr int kEarlySignals = 104;

}  // namespace emulator
