// Handler of target jax_ep_network_plan.

#include "cuda/network/plan.h"

#include "ffi/network/network_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

constexpr int32_t kBlocks = 16;  // enough for choices and places of thousands of tokens

ffi::Error NetworkPlan(cudaStream_t stream, int32_t device, const NetworkPlanAttrs& attrs,
                       const DeviceNetworkPlanBuffers& buffers) {
  Checker check("plan");
  ops::NetworkPlanArgs args{};
  CheckCall(check, attrs, buffers, args);
  check.Attribute("masked", attrs.masked == 0, "0, but in latency mode", attrs.masked);
  if (!check.ok()) return check.error();
  NetworkGroup group;
  if (auto error = PrepareNetworkGroup(attrs.group, buffers.coords, device, cuda::OpKind::kPlan,
                                       AgreedOn(args), group);
      error.failure()) {
    return error;
  }
  cuda::NetworkPlanParams params = cuda::NetworkParamsOf(args);
  params.network = group.params;
  params.message_bytes = group.message_bytes;
  params.num_blocks = group.node.NumBlocks(attrs.group, kBlocks);
  params.scratch = static_cast<int32_t*>(buffers.scratch.untyped_data());
  CheckScratch(check, buffers.scratch,
               cuda::NetworkPlanScratchSize(args.shape.num_local_experts()) * sizeof(int32_t));
  check.Attribute("num_experts", cuda::FitsNetworkPlan(params),
                  "a plan that the group's messages and the GPU's shared memory have room for",
                  args.shape.num_experts);
  if (!check.ok()) return check.error();
  return ToError(cuda::LaunchNetworkPlan(params, stream), "plan");
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_network_plan_execute, NetworkPlan, NETWORK_PLAN);

}  // namespace jax_ep
