// The routing plan of a whole group, made on the host from every rank's expert choices.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/routing.h"

namespace jax_ep::plan {

// The numbers that all ranks of the group share. Symbols as in routing.h.
struct PlanShape {
  int32_t num_ranks;        // R
  int32_t num_tokens;       // T
  int32_t top_k;            // K
  int32_t num_experts;      // E, a multiple of R
  int32_t capacity;         // C, in layout "expert" a multiple of alignment
  int32_t alignment;        // A, used in layout "expert"
  int32_t expert_capacity;  // rows an expert keeps at most; INT32_MAX: no such bound
  Layout layout;
  bool masked;  // layout "expert": each expert has A rows, used or not, and C is L * A

  int32_t num_local_experts() const { return num_experts / num_ranks; }
  int32_t rows_per_source() const { return RowsPerSource(layout, top_k, num_local_experts()); }
};

// One rank's input and its part of the plan. M is rows_per_source().
struct RankPlan {
  const int32_t* topk_idx;  // [T, K]
  int32_t* topk;            // [T, K] sanitised
  int32_t* dest_row;        // [T, K] row at the entry's destination rank, or -1
  int32_t* recv_rows;       // [R * T, M] this rank's rows of each source token, then -1
  int32_t* recv_src;        // [C] source of each row (EncodeSource), or -1
  int32_t* expert_idx;      // [C, K] local expert of each source entry, or -1; layout "token" only
  int32_t* group_sizes;     // [L]
  int32_t* counts;          // [L]
  int32_t* demand;          // [L]
  int32_t* num_dropped;     // [1]
  int32_t* num_invalid;     // [1]
};

// Fills every rank's outputs. `ranks` holds R entries, in rank order.
void BuildPlans(const PlanShape& shape, const std::vector<RankPlan>& ranks);

}  // namespace jax_ep::plan
