// What handlers that launch a plan have in common.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/plan/plan.h"
#include "ffi/cuda/device_call.h"

namespace jax_ep {

struct PlanCall {
  DeviceGroup group;
  cuda::PlanParams params;
  cuda::PlanKernel kernel;

  int64_t scratch_bytes() const { return cuda::PlanScratchSize(params) * sizeof(int32_t); }

  // Gives the kernel its scratch memory, where peers can read it.
  void Place(SharedOperands& shared, void* scratch) {
    if (kernel != cuda::PlanKernel::kPull) return;
    params.shared_topk = shared.Scratch(
        "topk", params.topk, int64_t{params.num_tokens} * params.top_k * sizeof(int32_t));
    params.scratch = shared.Scratch("scratch", static_cast<int32_t*>(scratch), scratch_bytes());
  }
};

// Completes a plan whose arguments have been checked, but for its scratch memory, or says through
// `check` that there is no kernel for it.
inline ::xla::ffi::Error PreparePlan(Checker& check, const ops::PlanArgs& args,
                                     const GroupAttrs& attrs, ::xla::ffi::AnyBuffer coords,
                                     int32_t device, PlanCall& call) {
  check.Attribute("masked", !args.shape.masked, "0, but in latency mode", args.shape.masked);
  if (!check.ok()) return check.error();
  if (auto error =
          PrepareGroup(attrs, coords, device, cuda::OpKind::kPlan, AgreedOn(args), call.group);
      error.failure()) {
    return error;
  }
  call.params = cuda::ParamsOf(args);
  call.params.group = call.group.params;
  call.params.max_blocks = call.group.member->max_blocks;
  call.kernel = cuda::ChoosePlanKernel(call.params);
  if (call.kernel == cuda::PlanKernel::kNone) {
    check.Fail("attributes num_experts and num_ranks", "a plan that fits the GPU's shared memory",
               std::to_string(attrs.num_experts) + " and " + std::to_string(attrs.num_ranks));
  }
  return check.ok() ? ::xla::ffi::Error::Success() : check.error();
}

}  // namespace jax_ep
