// Dispatch: every row of every rank fetches its token.
#pragma once

#include <vector>

#include "cpu/work.h"
#include "ops/dispatch.h"

namespace jax_ep::cpu {

// The op for a whole group; `ranks` holds every rank's arguments, in rank order, and must outlive
// the work. Unused rows become zero.
RowWork DispatchWork(std::vector<const ops::DispatchArgs*> ranks);

}  // namespace jax_ep::cpu
