// Combine: every token sums its rows from all ranks, in a fixed order.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/geometry.h"
#include "cpu/work.h"

namespace jax_ep::cpu {

// One rank's operands and results. Pointers marked "or null" are null on all ranks or on none.
struct CombineArgs {
  Geometry geometry;
  const void* rows;          // [C, H]
  const float* row_weights;  // [C], or null: the sum is plain
  const float* values;       // [C] (layout "expert") or [C, K] (layout "token"), or null
  Handle handle;
  void* y;      // [T, H]
  float* home;  // [T, K] values brought to the entries they belong to, or null
};

// The op for a whole group; `ranks` holds every rank's arguments, in rank order, and must outlive
// the work.
//
// Rows of a token are first summed on their rank, in the order of recv_rows, in float32 from +0,
// each multiplied by its weight if there are weights, and the sum is rounded to the row dtype.
// These partial rows are summed at home by ascending rank, in float32 from +0, and rounded.
RowWork CombineWork(std::vector<const CombineArgs*> ranks);

}  // namespace jax_ep::cpu
