// The plan op: routes of a whole group, made from every rank's expert choices.
#pragma once

#include <vector>

#include "cpu/work.h"
#include "ops/plan.h"

namespace jax_ep::cpu {

// The op for a whole group; `ranks` holds every rank's arguments, in rank order, and must outlive
// the work.
RowWork PlanWork(std::vector<const ops::PlanArgs*> ranks);

}  // namespace jax_ep::cpu
