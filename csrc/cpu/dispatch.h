// Dispatch: every row of every rank fetches its token.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/geometry.h"
#include "cpu/work.h"

namespace jax_ep::cpu {

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
  bool dense_output;     // with quantization: rows are rounded to fp8 and come in x's dtype
  const void* x;         // [T, H]
  const float* scales;   // [T, H / 128], or null; x is float8_e4m3fn exactly when given
  const float* weights;  // [T, K], or null
  Handle handle;
  void* rows;          // [C, H] in x's dtype, or float8_e4m3fn for quantized output
  float* row_scales;   // [C, H / 128], or null; given for quantized input and quantized output
  float* row_weights;  // [C] (layout "expert") or [C, K] (layout "token"), or null
};

// The op for a whole group; `ranks` holds every rank's arguments, in rank order, and must outlive
// the work. Unused rows become zero.
RowWork DispatchWork(std::vector<const DispatchArgs*> ranks);

}  // namespace jax_ep::cpu
