// Shared by the two kernels of the plan op.
//
// Rows are counted by *column*: a column is an expert in layout "expert", a rank in layout "token".
// A *slot* is a column together with a source rank. For this rank's own tokens all columns are
// counted. For tokens of peers only those columns are counted whose rows are here.
#pragma once

#include <cstdint>

#include "cuda/core/sync.cuh"
#include "cuda/plan/plan.h"

namespace jax_ep::cuda {

// The kernel that reads out of peers' memory (pull.cu), and the one that sends (push.cu).
int64_t PullPlanScratchSize(int32_t num_experts, int32_t num_ranks);
bool FitsPullPlan(const PlanParams& params);
cudaError_t LoadPullPlan();
cudaError_t LaunchPullPlan(const PlanParams& params, cudaStream_t stream);

bool FitsPushPlan(const PlanParams& params);
cudaError_t LoadPushPlan();
cudaError_t LaunchPushPlan(const PlanParams& params, cudaStream_t stream);

namespace {

using plan::Layout;

__host__ __device__ int32_t NumColumns(Layout layout, int32_t num_experts, int32_t num_ranks) {
  return layout == Layout::kExpert ? num_experts : num_ranks;
}

__host__ __device__ int32_t NumColumnsHere(const PlanParams& p) {
  return p.layout == Layout::kExpert ? p.num_experts / p.group.num_ranks : 1;
}

__host__ __device__ int32_t NumSlots(const PlanParams& p) {
  return NumColumns(p.layout, p.num_experts, p.group.num_ranks) +
         (p.group.num_ranks - 1) * NumColumnsHere(p);
}

// Whether entry k of a token is valid: in range, and no repetition of an earlier one.
__device__ bool IsValid(const int32_t* ids /*[K]*/, int32_t k, int32_t num_experts) {
  const int32_t id = ids[k];
  if (id < 0 || id >= num_experts) return false;
  for (int32_t earlier = 0; earlier < k; ++earlier) {
    if (ids[earlier] == id) return false;
  }
  return true;
}

__device__ int32_t InclusiveWarpSum(int32_t value) {
  for (int offset = 1; offset < 32; offset *= 2) {
    const int32_t other = __shfl_up_sync(~0u, value, offset);
    if (threadIdx.x % 32 >= offset) value += other;
  }
  return value;
}

// The result of a failed plan: no rows, and impossible counts. By one of `num_threads` threads.
__device__ __noinline__ void Poison(const PlanParams& p, int32_t thread, int32_t num_threads) {
  const int32_t num_local = p.num_experts / p.group.num_ranks;
  const int32_t num_rows =
      p.group.num_ranks * p.num_tokens * plan::RowsPerSource(p.layout, p.top_k, num_local);
  for (int32_t i = thread; i < p.num_tokens * p.top_k; i += num_threads)
    p.dest_row[i] = plan::kNone;
  for (int32_t i = thread; i < num_rows; i += num_threads) p.recv_rows[i] = plan::kNone;
  for (int32_t l = thread; l < num_local; l += num_threads) {
    p.counts[l] = p.group_sizes[l] = p.demand[l] = -1;
  }
  if (thread == 0) *p.num_dropped = *p.num_invalid = -1;
}

}  // namespace

}  // namespace jax_ep::cuda
