// Device memory that other processes of this host can map: found, allocated, exported, imported.
//
// A handle (a file descriptor) opens the whole allocation to whoever holds it. What is mapped here
// stays mapped until the process ends: a kernel of a failed peer may still use it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace jax_ep::transport {

// An allocation of this process as others may open it. The descriptor is the caller's to close.
struct ExportedMemory {
  int descriptor = -1;
  uint64_t base = 0;  // where this process has it
  uint64_t size = 0;  // bytes
};

// Exports the allocation on `device` that holds `pointer`. Fails for memory that did not come from
// cuMemCreate, as that of cudaMalloc and of memory pools.
std::optional<std::string> ExportAllocation(int device, uint64_t pointer, ExportedMemory& exported);

// Allocates at least `bytes` of zeros on `device` that ExportAllocation can export; `devices` of
// this process can use it.
std::optional<std::string> AllocateExportable(int device, const std::vector<int>& devices,
                                              uint64_t bytes, uint64_t& base);

// Maps what another process exported, for `devices` of this process. The descriptor stays open.
std::optional<std::string> ImportMemory(int descriptor, uint64_t size,
                                        const std::vector<int>& devices, uint64_t& base);

// 16 bytes that name the physical GPU, in hexadecimal digits.
std::optional<std::string> DeviceUuid(int device, std::string& uuid);

}  // namespace jax_ep::transport
