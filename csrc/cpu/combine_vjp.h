// The gradient of combine with fused row weights, layout "expert".
#pragma once

#include <vector>

#include "cpu/work.h"
#include "ops/combine_vjp.h"

namespace jax_ep::cpu {

// The op for a whole group; `ranks` holds every rank's arguments, in rank order, and must outlive
// the work. A used row with source token dy gives d_rows = round(weight * dy) and
// d_weights = dot(row, dy); unused rows give zeros.
//
// The dot product has one fixed order: 256 lanes, lane j summing the products of channels
// j, j + 256, ... in turn from +0, then lane j += lane j + s for s = 128, 64, ..., 1.
RowWork CombineVjpWork(std::vector<const ops::CombineVjpArgs*> ranks);

}  // namespace jax_ep::cpu
