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

// The same of a group that spans hosts.
struct NetworkPlanArgs {
  plan::PlanShape shape;
  const int32_t* topk_idx;  // [T, K]
  int32_t* topk;            // [T, K] sanitised
  int32_t* recv_start;      // [R + 1]
  int32_t* recv_token;      // [C]
  int32_t* recv_row;        // [C]
  int32_t* recv_src;        // [C]
  int32_t* expert_idx;      // [C, K] in layout "token", else empty
  int32_t* group_sizes;     // [L]
  int32_t* counts;          // [L]
  int32_t* demand;          // [L]
  int32_t* num_dropped;     // [1]
  int32_t* num_invalid;     // [1]
};

inline AgreedNumbers AgreedOn(const plan::PlanShape& shape) {
  return {shape.num_tokens, shape.top_k,          shape.num_experts,
          shape.capacity,   shape.alignment,      static_cast<int64_t>(shape.layout),
          shape.num_ranks,  shape.expert_capacity};
}
inline AgreedNumbers AgreedOn(const PlanArgs& args) { return AgreedOn(args.shape); }
inline AgreedNumbers AgreedOn(const NetworkPlanArgs& args) { return AgreedOn(args.shape); }

}  // namespace jax_ep::ops
