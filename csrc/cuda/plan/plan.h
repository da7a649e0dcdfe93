// The plan op on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/core/group_params.h"
#include "ops/plan.h"
#include "plan/routing.h"

namespace jax_ep::cuda {

// Symbols as in plan/routing.h. Rows are counted by *column*: an expert in layout "expert", a rank
// in layout "token".
struct PlanParams {
  GroupParams group;
  plan::Layout layout;
  int32_t num_tokens;
  int32_t top_k;
  int32_t num_experts;
  int32_t capacity;
  int32_t alignment;
  int32_t expert_capacity;
  const int32_t* topk_idx;  // [T, K]
  int32_t* topk;            // [T, K]
  int32_t* shared_topk;     // [T, K], where peers read them; may be topk
  int32_t* dest_row;        // [T, K]
  int32_t* recv_rows;       // [R * T, M]
  int32_t* recv_src;        // [C]
  int32_t* expert_idx;      // [C, K] in layout "token", else unused
  int32_t* group_sizes;     // [L]
  int32_t* counts;          // [L]
  int32_t* demand;          // [L]
  int32_t* num_dropped;     // [1]
  int32_t* num_invalid;     // [1]
  int32_t* scratch;         // [PlanScratchSize()]; peers read it
  int32_t max_blocks;       // of kPull, the same on all ranks; 0 for what is best
  bool is_followed;         // of kPush: a dispatch is launched behind it, and ends the channel's op
};

// The parameters that follow from the op's arguments, for the kernel that sends. The caller sets
// the group, and the arrays that peers read in the other kernel.
inline PlanParams ParamsOf(const ops::PlanArgs& args) {
  const plan::PlanShape& shape = args.shape;
  const plan::RankPlan& buffers = args.buffers;
  PlanParams params{};
  params.layout = shape.layout;
  params.num_tokens = shape.num_tokens;
  params.top_k = shape.top_k;
  params.num_experts = shape.num_experts;
  params.capacity = shape.capacity;
  params.alignment = shape.alignment;
  params.expert_capacity = shape.expert_capacity;
  params.topk_idx = buffers.topk_idx;
  params.topk = buffers.topk;
  params.dest_row = buffers.dest_row;
  params.recv_rows = buffers.recv_rows;
  params.recv_src = buffers.recv_src;
  params.expert_idx = buffers.expert_idx;
  params.group_sizes = buffers.group_sizes;
  params.counts = buffers.counts;
  params.demand = buffers.demand;
  params.num_dropped = buffers.num_dropped;
  params.num_invalid = buffers.num_invalid;
  return params;
}

constexpr uint32_t kPushPlanBlocks = 8;  // on one SM each

enum class PlanKernel {
  kPush,  // ranks send each other what they need: fast
  kPull,  // ranks read it, for shapes that kPush has no room for
  kNone,  // too many experts or ranks for either
};

// Depends on the shape only, so that all ranks agree.
PlanKernel ChoosePlanKernel(const PlanParams& params);

// Number of int32 in PlanParams::scratch, by the shape; -1 if no kernel has room for it.
int64_t PlanScratchSize(const PlanParams& params);

cudaError_t LaunchPlan(const PlanParams& params, PlanKernel kernel, cudaStream_t stream);

// Loads the kernels on the current device, so that no launch loads them.
cudaError_t LoadPlan();

}  // namespace jax_ep::cuda
