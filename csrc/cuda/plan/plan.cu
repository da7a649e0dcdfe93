// The plan op: chooses the kernel for a shape.

#include "cuda/plan/common.cuh"
#include "cuda/plan/plan.h"

namespace jax_ep::cuda {
PlanKernel ChoosePlanKernel(const PlanParams& params) {
  if (FitsPushPlan(params)) return PlanKernel::kPush;
  return FitsPullPlan(params) ? PlanKernel::kPull : PlanKernel::kNone;
}

int64_t PlanScratchSize(const PlanParams& params) {
  switch (ChoosePlanKernel(params)) {
    case PlanKernel::kPush:
      return 0;
    case PlanKernel::kPull:
      return PullPlanScratchSize(params.num_experts, params.group.num_ranks);
    default:
      return -1;
  }
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
