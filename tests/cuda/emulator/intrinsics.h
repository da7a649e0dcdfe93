// Device functions of CUDA C++.
#pragma once

#include <cstdint>
#include <cstring>

#include "emulator.h"

// Threads that meet -------------------------------------------------------------------------------

inline void __syncthreads() { emulator::CountAtBarrier(false); }
inline int __syncthreads_count(int value) { return emulator::CountAtBarrier(value != 0); }
inline int __syncthreads_or(int value) { return emulator::CountAtBarrier(value != 0) != 0; }
inline int __syncthreads_and(int value) { return emulator::CountAtBarrier(value == 0) == 0; }

inline void __syncwarp(uint32_t mask = ~0u) {
  if (emulator::Mutation() == emulator::kWithoutWarps) return;
  emulator::Exchange([](const uint64_t*, uint32_t, uint32_t, uint32_t) { return uint64_t{0}; },
                     mask, 0, 0);
}

inline uint32_t __ballot_sync(uint32_t mask, int value) {
  return static_cast<uint32_t>(emulator::Exchange(
      [](const uint64_t* values, uint32_t of, uint32_t, uint32_t) {
        uint64_t bits = 0;
        for (int i = 0; i < 32; ++i) bits |= (of >> i & 1) != 0 && values[i] != 0 ? 1ull << i : 0;
        return bits;
      },
      mask, value != 0, 0));
}
inline int __all_sync(uint32_t mask, int value) { return __ballot_sync(mask, value) == mask; }
inline int __any_sync(uint32_t mask, int value) { return __ballot_sync(mask, value) != 0; }

template <typename T>
uint32_t __match_any_sync(uint32_t mask, T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return static_cast<uint32_t>(emulator::Exchange(
      [](const uint64_t* values, uint32_t of, uint32_t lane, uint32_t) {
        uint64_t same = 0;
        for (int i = 0; i < 32; ++i) {
          same |= (of >> i & 1) != 0 && values[i] == values[lane] ? 1ull << i : 0;
        }
        return same;
      },
      mask, bits, 0));
}

inline int32_t __reduce_add_sync(uint32_t mask, int32_t value) {
  return static_cast<int32_t>(emulator::Exchange(
      [](const uint64_t* values, uint32_t of, uint32_t, uint32_t) {
        uint64_t sum = 0;
        for (int i = 0; i < 32; ++i) sum += (of >> i & 1) != 0 ? values[i] : 0;
        return sum;
      },
      mask, static_cast<uint32_t>(value), 0));
}
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t value) {
  return static_cast<uint32_t>(emulator::Exchange(
      [](const uint64_t* values, uint32_t of, uint32_t, uint32_t) {
        uint64_t bits = 0;
        for (int i = 0; i < 32; ++i) bits |= (of >> i & 1) != 0 ? values[i] : 0;
        return bits;
      },
      mask, static_cast<uint32_t>(value), 0));
}

namespace emulator {

template <typename T>
T Shuffle(uint32_t mask, T value, uint32_t from) {
  static_assert(sizeof(T) <= 8, "values that fit two registers");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = Exchange(
      [](const uint64_t* values, uint32_t of, uint32_t, uint32_t source) {
        if ((of >> source & 1) == 0) Abort("a shuffle from lane %u, which takes no part", source);
        return values[source];
      },
      mask, bits, from);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline uint32_t Lane() { return threadIdx.x % 32; }

}  // namespace emulator

template <typename T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
  const uint32_t first = emulator::Lane() / width * width;
  return emulator::Shuffle(mask, value, first + static_cast<uint32_t>(from) % width);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, uint32_t offset, int width = 32) {
  const uint32_t lane = emulator::Lane();
  return emulator::Shuffle(mask, value, lane % width >= offset ? lane - offset : lane);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, uint32_t offset, int width = 32) {
  const uint32_t lane = emulator::Lane();
  return emulator::Shuffle(mask, value,
                           lane % width + offset < uint32_t(width) ? lane + offset : lane);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  const uint32_t lane = emulator::Lane();
  const uint32_t from = lane ^ bits;
  return emulator::Shuffle(mask, value, from / width <= lane / width ? from : lane);
}

// Memory ------------------------------------------------------------------------------------------

inline void __threadfence_block() { emulator::SometimesYield(2); }
inline void __threadfence() { emulator::SometimesYield(2); }
inline void __threadfence_system() { emulator::SometimesYield(2); }
inline void __nanosleep(uint32_t ns) { emulator::Sleep(ns); }

template <typename T>
T __ldcg(const T* address) {
  emulator::CheckGlobal(address, sizeof(T), "__ldcg");
  emulator::SometimesYield(64);
  return *static_cast<const volatile T*>(address);
}
#define EMULATOR_LDCG_VECTOR(T)                          \
  template <>                                            \
  inline T __ldcg(const T* address) {                    \
    emulator::CheckGlobal(address, sizeof(T), "__ldcg"); \
    emulator::SometimesYield(64);                        \
    return *address;                                     \
  }
EMULATOR_LDCG_VECTOR(uint2)
EMULATOR_LDCG_VECTOR(uint4)
#undef EMULATOR_LDCG_VECTOR

template <typename T>
void __stcs(T* address, T value) {
  emulator::CheckGlobal(address, sizeof(T), "__stcs");
  *address = value;
}

// One fiber runs at a time, so no other access comes between.
namespace emulator {
template <typename T, typename Change>
T Atomically(T* address, Change change) {
  SometimesYield(4);
  const T before = *address;
  *address = change(before);
  return before;
}
}  // namespace emulator

template <typename T>
T atomicAdd(T* address, T value) {
  return emulator::Atomically(address, [=](T before) { return before + value; });
}
template <typename T>
T atomicOr(T* address, T value) {
  return emulator::Atomically(address, [=](T before) { return before | value; });
}
template <typename T>
T atomicMin(T* address, T value) {
  return emulator::Atomically(address, [=](T before) { return before < value ? before : value; });
}
template <typename T>
T atomicMax(T* address, T value) {
  return emulator::Atomically(address, [=](T before) { return before > value ? before : value; });
}
template <typename T>
T atomicExch(T* address, T value) {
  return emulator::Atomically(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS_system(T* address, T expected, T value) {
  return emulator::Atomically(address,
                              [=](T before) { return before == expected ? value : before; });
}

// Arithmetic; compiled with -ffp-contract=off
// ------------------------------------------------------

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(x)); }
inline uint32_t __umulhi(uint32_t x, uint32_t y) { return uint64_t{x} * y >> 32; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
template <typename T>
constexpr T min(T x, T y) {
  return y < x ? y : x;
}
template <typename T>
constexpr T max(T x, T y) {
  return x < y ? y : x;
}
