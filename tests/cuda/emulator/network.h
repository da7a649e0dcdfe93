// A network between processing elements, as NVSHMEM's model allows it at worst: what is sent
// arrives late, in pieces, in any order; sources are read as late as that; only the signal of a put
// comes after its bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

// The symmetric memory of a processing element: the same size on all of them.
void AddHeap(int pe, void* base, size_t size);

// `to` and `signal` are places in the caller's heap, and mean the same places in that of `pe`.
void Put(void* to, const void* from, size_t bytes, uint64_t* signal, uint64_t value, int pe);
void PutSignal(uint64_t* signal, uint64_t value, int pe);

// Delivers what is due. By the device's thread.
void AdvanceNetwork();

// Payload that has been delivered so far, without signals.
uint64_t BytesCarried();

// JAX_EP_EMULATOR_MUTATION: the network itself does not keep to the model, and sets signals at
// once.
constexpr int kEarlySignals = 104;

}  // namespace emulator
