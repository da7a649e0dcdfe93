// Handler of target jax_ep_plan_dispatch on GPUs: a plan, and a dispatch launched behind it.

#include "ffi/cuda/node_dispatch.h"
#include "ffi/cuda/plan_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

// The dispatch may begin while the plan runs. Its blocks then wait for peers' plans, so where ranks
// share the GPU, there must be room for these: a cluster of 8 blocks, which have to be in one of at
// most 8 parts of the GPU. So 57 SMs must be free, besides those that ops leave to others anyway.
constexpr int kFreeSms = 57;
constexpr int kPlanAndCastSms = cuda::kPushPlanBlocks + 1;  // a block of a cast waits for its plan

bool CanBeginEarly(const transport::Member& member, int num_blocks) {
  const int sms = member.ranks_per_gpu * member.max_blocks;
  return member.ranks_per_gpu == 1 ||
         (member.ranks_per_gpu - 1) * (kPlanAndCastSms + num_blocks) <= sms - kFreeSms;
}

ffi::Error PlanDispatch(cudaStream_t stream, int32_t device, const PlanDispatchAttrs& attrs,
                        const DevicePlanDispatchBuffers& buffers) {
  Checker check("dispatch");
  ops::PlanArgs plan_args{};
  ops::DispatchArgs args{};
  CheckDeviceGroup(check, attrs.group, buffers.coords);
  if (check.ok()) Decode(check, attrs, buffers, plan_args, args);
  if (!check.ok()) return check.error();
  PlanCall plan;
  if (auto error = PreparePlan(check, plan_args, attrs.group, buffers.coords, device, plan);
      error.failure()) {
    return error;
  }
  const int64_t plan_bytes = (plan.scratch_bytes() + 127) / 128 * 128;
  DeviceGroup group;
  cuda::DispatchParams params;
  if (auto error = PrepareNodeDispatch(check, args, attrs.group, buffers.coords, device,
                                       buffers.scratch, plan_bytes, group, params);
      error.failure()) {
    return error;
  }
  SharedOperands shared(group, stream);
  char* const memory = static_cast<char*>(buffers.scratch.untyped_data());
  plan.Place(shared, memory);
  params.behind_plan =
      plan.kernel == cuda::PlanKernel::kPush && CanBeginEarly(*group.member, params.num_blocks);
  plan.params.is_followed = params.behind_plan;
  params.plan_tag = plan.params.group.tag;
  return LaunchNodeDispatch(check, args, group, shared, stream, memory + plan_bytes, params,
                            [&] { return cuda::LaunchPlan(plan.params, plan.kernel, stream); });
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_plan_dispatch_execute, PlanDispatch, PLAN_DISPATCH);

}  // namespace jax_ep
