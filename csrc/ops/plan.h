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

// What the shape says of an op along the plan; hidden and dtype are missing.
inline Geometry GeometryOf(const plan::PlanShape& shape) {
  Geometry geometry{};
  geometry.num_ranks = shape.num_ranks;
  geometry.num_experts = shape.num_experts;
  geometry.num_tokens = shape.num_tokens;
  geometry.top_k = shape.top_k;
  geometry.capacity = shape.capacity;
  geometry.layout = shape.layout;
  return geometry;
}

inline AgreedNumbers AgreedOn(const plan::PlanShape& shape) {
  return {shape.num_tokens, shape.top_k,           shape.num_experts,
          shape.capacity,   shape.alignment,       static_cast<int64_t>(shape.layout),
          shape.num_ranks,  shape.expert_capacity, shape.masked};
}
inline AgreedNumbers AgreedOn(const PlanArgs& args) { return AgreedOn(args.shape); }
inline AgreedNumbers AgreedOn(const NetworkPlanArgs& args) { return AgreedOn(args.shape); }

}  // namespace jax_ep::ops
