// Divisions by numbers that the host knows, as products.
#pragma once

#include <cstdint>

#include "plan/host_device.h"

namespace jax_ep::cuda {

// x / divisor: for x below 2^16 and divisors up to 2^12.
struct Divider {
  uint32_t factor;

  static Divider By(int32_t divisor) { return {~0u / static_cast<uint32_t>(divisor)}; }
  JAX_EP_HOST_DEVICE int32_t operator()(int32_t x) const {
    return static_cast<int32_t>(uint64_t{static_cast<uint32_t>(x) + 1} * factor >> 32);
  }
};

}  // namespace jax_ep::cuda
