// Handler of target jax_ep_plan on GPUs.

#include "ffi/cuda/plan_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Error Plan(cudaStream_t stream, int32_t device, const PlanAttrs& attrs,
                const DevicePlanBuffers& buffers) {
  Checker check("plan");
  ops::PlanArgs args{};
  CheckCall(check, attrs, buffers, args);
  if (!check.ok()) return check.error();
  PlanCall call;
  if (auto error = PreparePlan(check, args, attrs.group, buffers.coords, device, call);
      error.failure()) {
    return error;
  }
  CheckScratch(check, buffers.scratch, call.scratch_bytes());
  if (!check.ok()) return check.error();
  SharedOperands shared(call.group, stream);
  call.Place(shared, buffers.scratch.untyped_data());
  if (auto error = shared.error(); error.failure()) return error;
  return ToError(cuda::LaunchPlan(call.params, call.kernel, stream), "plan");
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_plan_execute, Plan, PLAN);

}  // namespace jax_ep
