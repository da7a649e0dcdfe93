// Delays and orders, repeatable for a seed and a PE as far as the threads' timing is.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace jax_ep::late {

// Nanoseconds of a clock that all processes of a machine share.
inline uint64_t Now() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

class Chance {
 public:
  Chance(uint64_t seed, int pe, uint64_t longest_ns)
      : state_(seed * 0x2545f4914f6cdd1du + pe), longest_ns_(longest_ns) {}

  size_t Below(size_t bound) { return Next() % bound; }
  uint64_t Later(uint64_t now) { return now + (longest_ns_ == 0 ? 0 : Next() % longest_ns_); }

  template <typename T>
  void Shuffle(T* items, int count) {
    for (int i = count - 1; i > 0; --i) std::swap(items[i], items[Below(i + 1)]);
  }

 private:
  // splitmix64, by Sebastiano Vigna
  uint64_t Next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  uint64_t state_;
  const uint64_t longest_ns_;
};

}  // namespace jax_ep::late
