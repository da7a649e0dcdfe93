// Combine: every token sums its rows from all ranks, in a fixed order.
#pragma once

#include <vector>

#include "cpu/work.h"
#include "ops/combine.h"

namespace jax_ep::cpu {

// The op for a whole group; `ranks` holds every rank's arguments, in rank order, and must outlive
// the work.
//
// Rows of a token are first summed on their rank, in the order of recv_rows, in float32 from +0,
// each multiplied by its weight if there are weights, and the sum is rounded to the row dtype.
// These partial rows are summed at home by ascending rank, in float32 from +0, and rounded.
RowWork CombineWork(std::vector<const ops::CombineArgs*> ranks);

}  // namespace jax_ep::cpu
