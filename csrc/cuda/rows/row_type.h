// Dtypes of rows that kernels compute with.
#pragma once

#include <cstdint>

#include "plan/host_device.h"

namespace jax_ep::cuda {

enum class RowType : int32_t { kFloat32, kBFloat16, kFloat16 };

JAX_EP_HOST_DEVICE constexpr int32_t ByteWidth(RowType type) {
  return type == RowType::kFloat32 ? 4 : 2;
}

}  // namespace jax_ep::cuda
