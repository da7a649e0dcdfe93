// The plan op: which of its kernels serves a shape.

#include "cuda/plan.h"
#include "cuda/plan_common.cuh"

namespace jax_ep::cuda {
namespace {

// Entries of a rank up to which one cluster of blocks is quicker than many blocks that have to wait
// for each other: on an H200, 2048 tokens of 8 experts take 21 against 25 us, 4096 take 29
// against 25.
constexpr int64_t kMaxPushEntries = 16 << 10;

}  // namespace

PlanKernel ChoosePlanKernel(const PlanParams& params) {
  const bool is_small = int64_t{params.num_tokens} * params.top_k <= kMaxPushEntries;
  const bool fits_push = FitsPushPlan(params);
  const bool fits_pull = FitsPullPlan(params);
  if (fits_push && (is_small || !fits_pull)) return PlanKernel::kPush;
  return fits_pull ? PlanKernel::kPull : PlanKernel::kNone;
}

int64_t PlanScratchSize(const PlanParams& params) {
  if (ChoosePlanKernel(params) != PlanKernel::kPull) return 0;
  return PullPlanScratchSize(params.num_experts, params.group.num_ranks);
}

cudaError_t LoadPlan() {
  const cudaError_t error = LoadPushPlan();
  return error != cudaSuccess ? error : LoadPullPlan();
}

cudaError_t LaunchPlan(const PlanParams& params, PlanKernel kernel, cudaStream_t stream) {
  switch (kernel) {
    case PlanKernel::kPush:
      return LaunchPushPlan(params, stream);
    case PlanKernel::kPull:
      return LaunchPullPlan(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jax_ep::cuda
