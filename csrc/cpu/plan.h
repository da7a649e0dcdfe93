// The plan op: routes of a whole group, made from every rank's expert choices.
#pragma once

#include <vector>

#include "cpu/work.h"
#include "plan/build_plan.h"

namespace jax_ep::cpu {

// One rank's operands and results.
struct PlanArgs {
  plan::PlanShape shape;
  plan::RankPlan buffers;
};

// The op for a whole group; `ranks` holds every rank's arguments, in rank order, and must outlive
// the work.
RowWork PlanWork(std::vector<const PlanArgs*> ranks);

}  // namespace jax_ep::cpu
