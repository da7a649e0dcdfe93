// Memory of the device: allocations, poison, and which addresses belong to an allocation.
#pragma once

#include <cstddef>

namespace emulator {

// Poison, aligned to 256 bytes, with bytes after it that belong to no allocation.
void* Allocate(size_t size);
void Free(void* pointer);

// Sets bytes, as memset does. Large ranges of zeros take no memory until somebody writes to them.
void Fill(void* to, int value, size_t size);

}  // namespace emulator
