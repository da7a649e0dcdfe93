// Memory of the device. A rank's workspace has tens of megabytes, of which a test uses a few
// hundred kilobytes, so the pages of large allocations are made when they are first written to.
#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "device.h"

namespace emulator {
namespace {

constexpr int kPoison = 0xcd;
constexpr size_t kPage = 4096;
constexpr size_t kLarge = 1 << 20;  // also the size of the file of poison

// By address. Never destroyed, because the device's thread does not end before the process.
std::mutex& mutex = *new std::mutex;
std::map<uintptr_t, size_t>& allocations = *new std::map<uintptr_t, size_t>;
std::atomic<uint64_t> num_frees{0};

size_t RoundUp(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }
size_t RoundedSize(size_t size) { return RoundUp(size + 1, size < kLarge ? 256 : kPage); }

// Pages of no file are zeros, and those of a private mapping are copied when they are written to.
char* Map(void* at, size_t size, int flags, int file) {
  flags |= MAP_PRIVATE | (at != nullptr ? MAP_FIXED : 0) | (file < 0 ? MAP_ANONYMOUS : 0);
  void* memory = mmap(at, size, PROT_READ | PROT_WRITE, flags, file, 0);
  if (memory == MAP_FAILED) Abort("no memory");
  return static_cast<char*>(memory);
}

int PoisonFile() {
  static const int file = [] {
    const std::vector<char> poison(kLarge, static_cast<char>(kPoison));
    const int created = memfd_create("poison", MFD_CLOEXEC);
    if (created < 0 || write(created, poison.data(), kLarge) != ssize_t{kLarge}) {
      Abort("no file of poison");
    }
    return created;
  }();
  return file;
}

}  // namespace

void* Allocate(size_t size) {
  const size_t rounded = RoundedSize(size);
  char* memory;
  if (size < kLarge) {
    memory = static_cast<char*>(std::aligned_alloc(256, rounded));
    if (memory == nullptr) Abort("no memory");
    std::memset(memory, kPoison, rounded);
  } else {
    memory = Map(nullptr, rounded, MAP_NORESERVE, -1);
    for (size_t at = 0; at < rounded; at += kLarge) {
      Map(memory + at, std::min(kLarge, rounded - at), MAP_NORESERVE, PoisonFile());
    }
  }
  const std::lock_guard<std::mutex> lock(mutex);
  allocations[reinterpret_cast<uintptr_t>(memory)] = size;
  return memory;
}

void Free(void* pointer) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto it = allocations.find(reinterpret_cast<uintptr_t>(pointer));
  if (it == allocations.end()) Abort("%p is no allocation", pointer);
  if (it->second < kLarge) {
    std::free(pointer);
  } else {
    munmap(pointer, RoundedSize(it->second));
  }
  allocations.erase(it);
  ++num_frees;
}

void Fill(void* to, int value, size_t size) {
  char* begin = static_cast<char*>(to);
  char* const end = begin + size;
  if (value == 0 && size >= kLarge) {
    const auto offset = reinterpret_cast<uintptr_t>(begin) % kPage;
    char* const first_page = begin + (kPage - offset) % kPage;
    const size_t pages = static_cast<size_t>(end - first_page) / kPage * kPage;
    std::memset(begin, 0, static_cast<size_t>(first_page - begin));
    Map(first_page, pages, MAP_NORESERVE, -1);
    begin = first_page + pages;
  }
  std::memset(begin, value, static_cast<size_t>(end - begin));
}

void CheckGlobal(const void* pointer, size_t size, const char* what) {
  thread_local uintptr_t begin = 0, end = 0;  // of the allocation found last
  thread_local uint64_t when = 0;
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  if (begin <= at && at + size <= end && when == num_frees.load()) return;
  const std::lock_guard<std::mutex> lock(mutex);
  auto next = allocations.upper_bound(at);
  if (next != allocations.begin()) {
    --next;
    begin = next->first, end = begin + next->second, when = num_frees.load();
    if (at + size <= end) return;
  }
  Abort("%s: %zu bytes at %p, outside of all allocations", what, size, pointer);
}

size_t ReserveShared(size_t size, size_t alignment) {
  static size_t used = 0;
  const size_t offset = (used + alignment - 1) / alignment * alignment;
  used = offset + size;
  if (used > kStaticBytes) Abort("kStaticBytes is too little");
  return offset;
}

namespace {

std::vector<char*> free_shared;
constexpr size_t kGuard = 1024;  // bytes after a block's memory, which it must not write

}  // namespace

char* TakeSharedMemory() {
  constexpr size_t kBytes = DynamicAt(1024) + kMaxSharedBytes + kGuard;
  if (free_shared.empty()) {
    free_shared.push_back(static_cast<char*>(std::aligned_alloc(1024, kBytes / 1024 * 1024)));
    std::memset(free_shared.back(), kPoison, kBytes / 1024 * 1024);
  }
  char* memory = free_shared.back();
  free_shared.pop_back();
  return memory;
}

void FreeSharedMemory(char* memory, size_t bytes) {
  char* end = memory + bytes;
  for (char* byte = end; byte != end + kGuard; ++byte) {
    if (*byte != static_cast<char>(kPoison)) Abort("a block wrote past its shared memory");
  }
  std::memset(memory, kPoison, bytes);
  free_shared.push_back(memory);
}

}  // namespace emulator
