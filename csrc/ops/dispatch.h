// The arguments of the dispatch op, on any platform.
#pragma once

#include <cstdint>

#include "ops/geometry.h"
#include "plan/host_device.h"

namespace jax_ep::ops {

enum class Quantization : int32_t {
  kNone = 0,
  kFp8 = 1,       // float8_e4m3fn values, float32 scales
  kFp8Ue8m0 = 2,  // the same, scales rounded up to powers of two
};

// Channels that share one scale.
constexpr int32_t kScaleBlock = 128;

// Scales that are powers of two, of which only the exponents are given: 8 bits each, four of a row
// in a word, the first in the lowest byte. Words of consecutive rows lie side by side. Rows are
// packed in groups of `rows`: in a masked plan those of an expert, else all. What is added at the
// ends is zero.
struct PackedScales {
  int32_t rows;   // S of a group; 0 where scales are not packed
  int32_t words;  // W of a row

  JAX_EP_HOST_DEVICE int32_t padded_rows() const { return (rows + 3) / 4 * 4; }
  // Where word w of row s of group g is.
  JAX_EP_HOST_DEVICE int64_t At(int64_t g, int32_t w, int32_t s) const {
    return (g * words + w) * padded_rows() + s;
  }
};

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
  // Not 0 if row_scales has words instead (PackedScales), for groups of so many rows.
  int32_t packed_rows = 0;
};

// How row_scales are packed.
inline PackedScales PackedScalesOf(const DispatchArgs& args) {
  return {args.packed_rows, (args.geometry.hidden / kScaleBlock + 3) / 4};
}

inline AgreedNumbers AgreedOn(const DispatchArgs& args) {
  return AgreedOn(args.geometry, args.quantization, args.dense_output, args.scales != nullptr,
                  args.weights != nullptr);
}

}  // namespace jax_ep::ops
