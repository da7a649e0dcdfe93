// The arguments of the gradient of combine with fused row weights, layout "expert".
#pragma once

#include "ops/geometry.h"

namespace jax_ep::ops {

// One rank's operands and results.
struct CombineVjpArgs {
  Geometry geometry;
  UnusedRows unused_rows;
  const void* dy;            // [T, H] cotangents of combine's result
  const void* rows;          // [C, H] as combine had them
  const float* row_weights;  // [C] as combine had them
  Handle handle;
  void* d_rows;      // [C, H]
  float* d_weights;  // [C]
};

inline AgreedNumbers AgreedOn(const CombineVjpArgs& args) { return AgreedOn(args.geometry); }

}  // namespace jax_ep::ops
