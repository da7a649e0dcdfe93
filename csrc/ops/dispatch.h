// The arguments of the dispatch op, on any platform.
#pragma once

#include <cstdint>

#include "ops/geometry.h"

namespace jax_ep::ops {

enum class Quantization : int32_t {
  kNone = 0,
  kFp8 = 1,       // float8_e4m3fn values, float32 scales
  kFp8Ue8m0 = 2,  // the same, scales rounded up to powers of two
};

// Channels that share one scale.
constexpr int32_t kScaleBlock = 128;

// One rank's operands and results. Pointers marked "or null" are null on all ranks or on none.
struct DispatchArgs {
  Geometry geometry;  // dtype is that of x
  Quantization quantization;
  bool dense_output;  // with quantization: rows are rounded to fp8 and come in x's dtype
  UnusedRows unused_rows;
  const void* x;         // [T, H]
  const float* scales;   // [T, H / 128], or null; x is float8_e4m3fn exactly when given
  const float* weights;  // [T, K], or null
  Handle handle;
  void* rows;          // [C, H] in x's dtype, or float8_e4m3fn for quantized output
  float* row_scales;   // [C, H / 128], or null; given for quantized input and quantized output
  float* row_weights;  // [C] (layout "expert") or [C, K] (layout "token"), or null
};

inline AgreedNumbers AgreedOn(const DispatchArgs& args) {
  return AgreedOn(args.geometry, args.quantization, args.dense_output, args.scales != nullptr,
                  args.weights != nullptr);
}

}  // namespace jax_ep::ops
