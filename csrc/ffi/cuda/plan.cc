// Handler of target jax_ep_plan on GPUs.

#include "cuda/plan/plan.h"

#include <string>

#include "ffi/cuda/device_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Error Plan(cudaStream_t stream, int32_t device, const PlanAttrs& attrs,
                const DevicePlanBuffers& buffers) {
  Checker check("plan");
  ops::PlanArgs args{};
  CheckCall(check, attrs, buffers, args);
  check.Attribute("masked", attrs.masked == 0, "0, but in latency mode", attrs.masked);
  if (!check.ok()) return check.error();
  const plan::PlanShape& shape = args.shape;
  DeviceGroup group;
  if (auto error = PrepareGroup(attrs.group, buffers.coords, device, cuda::OpKind::kPlan,
                                AgreedOn(args), group);
      error.failure()) {
    return error;
  }
  cuda::PlanParams params = cuda::ParamsOf(args);
  params.group = group.params;
  params.max_blocks = group.member->max_blocks;
  const cuda::PlanKernel kernel = cuda::ChoosePlanKernel(params);
  if (kernel == cuda::PlanKernel::kNone) {
    check.Fail("attributes num_experts and num_ranks", "a plan that fits the GPU's shared memory",
               std::to_string(shape.num_experts) + " and " + std::to_string(shape.num_ranks));
  }
  CheckScratch(check, buffers.scratch, cuda::PlanScratchSize(params) * sizeof(int32_t));
  if (!check.ok()) return check.error();
  SharedOperands shared(group, stream);
  if (kernel == cuda::PlanKernel::kPull) {
    params.shared_topk = shared.Scratch("topk", params.topk,
                                        int64_t{shape.num_tokens} * shape.top_k * sizeof(int32_t));
    params.scratch =
        shared.Scratch("scratch", static_cast<int32_t*>(buffers.scratch.untyped_data()),
                       buffers.scratch.size_bytes());
  }
  if (auto error = shared.error(); error.failure()) return error;
  return ToError(cuda::LaunchPlan(params, kernel, stream), "plan");
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_plan_execute, Plan, PLAN);

}  // namespace jax_ep
