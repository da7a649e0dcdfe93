// Divisions by numbers that the host knows, as products.
#pragma once

#include <cstdint>

namespace jax_ep::cuda {

// x / divisor: for x below 2^16 and divisors up to 2^12.
struct Divider {
  uint32_t factor;

  static Divider By(int32_t divisor) { return {~0u / static_cast<uint32_t>(divisor)}; }
  __device__ __forceinline__ int32_t operator()(int32_t x) const {
    return static_cast<int32_t>(__umulhi(static_cast<uint32_t>(x) + 1, factor));
  }
};

}  // namespace jax_ep::cuda
