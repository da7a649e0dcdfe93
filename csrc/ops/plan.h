// The arguments of the plan op, on any platform.
#pragma once

#include "ops/geometry.h"
#include "plan/build_plan.h"

namespace jax_ep::ops {

// One rank's operands and results.
struct PlanArgs {
  plan::PlanShape shape;
  plan::RankPlan buffers;
};

inline AgreedNumbers AgreedOn(const PlanArgs& args) {
  const plan::PlanShape& shape = args.shape;
  return {shape.num_tokens, shape.top_k,          shape.num_experts,
          shape.capacity,   shape.alignment,      static_cast<int64_t>(shape.layout),
          shape.num_ranks,  shape.expert_capacity};
}

}  // namespace jax_ep::ops
