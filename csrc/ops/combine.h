// The arguments of the combine op, on any platform.
#pragma once

#include "ops/geometry.h"

namespace jax_ep::ops {

// One rank's operands and results. Pointers marked "or null" are null on all ranks or on none.
struct CombineArgs {
  Geometry geometry;
  const void* rows;          // [C, H]
  const float* row_weights;  // [C], or null: the sum is plain
  const float* values;       // [C] (layout "expert") or [C, K] (layout "token"), or null
  Handle handle;
  void* y;      // [T, H]
  float* home;  // [T, K] values brought to the entries they belong to; null as `values` is
};

inline AgreedNumbers AgreedOn(const CombineArgs& args) {
  return AgreedOn(args.geometry, args.row_weights != nullptr, args.home != nullptr);
}

}  // namespace jax_ep::ops
