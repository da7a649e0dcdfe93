// Dtypes of rows that kernels compute with.
#pragma once

#include <cstdint>

#include "ops/geometry.h"
#include "plan/host_device.h"

namespace jax_ep::cuda {

enum class RowType : int32_t { kFloat32, kBFloat16, kFloat16 };

JAX_EP_HOST_DEVICE constexpr int32_t ByteWidth(RowType type) {
  return type == RowType::kFloat32 ? 4 : 2;
}

// Of rows that are not float8.
inline RowType RowTypeOf(ops::DType dtype) {
  switch (dtype) {
    case ops::DType::kBFloat16:
      return RowType::kBFloat16;
    case ops::DType::kFloat16:
      return RowType::kFloat16;
    default:
      return RowType::kFloat32;
  }
}

}  // namespace jax_ep::cuda
