#include "network.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>

#include "device.h"

namespace emulator {
namespace {

struct Heap {
  int pe;
  char* base;
  size_t size;
};

// A part of a message: bytes, or the signal.
struct Delivery {
  uint64_t due;  // turns of the network
  char* to;
  const char* from;  // null for a signal
  size_t bytes;
  uint64_t value;
};

std::mutex& mutex = *new std::mutex;
std::vector<Heap>& heaps = *new std::vector<Heap>;
std::vector<Delivery>& under_way = *new std::vector<Delivery>;
uint64_t turns = 0, carried = 0;

// The same place in the heap of another processing element.
char* There(const void* here, size_t bytes, int pe) {
  const auto* place = static_cast<const char*>(here);
  for (const Heap& own : heaps) {
    if (place < own.base || place + bytes > own.base + own.size) continue;
    for (const Heap& other : heaps) {
      if (other.pe == pe) return other.base + (place - own.base);
    }
    Abort("there is no processing element %d", pe);
  }
  Abort("%p is in no symmetric heap", here);
}

// Mostly soon, sometimes much later.
uint64_t Due() { return turns + Random() % (Random() % 8 == 0 ? 20000 : 600); }

}  // namespace

void AddHeap(int pe, void* base, size_t size) {
  const std::lock_guard<std::mutex> lock(mutex);
  heaps.push_back({pe, static_cast<char*>(base), size});
}

void Put(void* to, const void* from, size_t bytes, uint64_t* signal, uint64_t value, int pe) {
  There(from, bytes, pe);  // a network may be unable to read a source outside the heap
  const std::lock_guard<std::mutex> lock(mutex);
  char* target = There(to, bytes, pe);
  uint64_t last = turns;
  for (size_t at = 0; at < bytes;) {
    const size_t piece = std::min<size_t>(bytes - at, 16 * (1 + Random() % 256));
    const uint64_t due = Due();
    under_way.push_back({due, target + at, static_cast<const char*>(from) + at, piece, 0});
    last = std::max(last, due);
    at += piece;
  }
  if (Mutation() == kEarlySignals) last = turns;
  if (signal == nullptr) return;
  under_way.push_back({last, There(signal, sizeof value, pe), nullptr, sizeof value, value});
}

void PutSignal(uint64_t* signal, uint64_t value, int pe) {
  const std::lock_guard<std::mutex> lock(mutex);
  under_way.push_back({Due(), There(signal, sizeof value, pe), nullptr, sizeof value, value});
}

void AdvanceNetwork() {
  ++turns;  // only the device's thread knows these two
  if (under_way.empty()) return;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const bool signals : {false, true}) {  // bytes first if both are due
    for (size_t i = 0; i < under_way.size();) {
      const Delivery message = under_way[i];
      if (message.due > turns || (message.from == nullptr) != signals) {
        ++i;
        continue;
      }
      under_way[i] = under_way.back();
      under_way.pop_back();
      if (signals) {
        std::memcpy(message.to, &message.value, sizeof message.value);
      } else {
        std::memcpy(message.to, message.from, message.bytes);
        carried += message.bytes;
      }
    }
  }
}

uint64_t BytesCarried() {
  const std::lock_guard<std::mutex> lock(mutex);
  return carried;
}

}  // namespace emulator
