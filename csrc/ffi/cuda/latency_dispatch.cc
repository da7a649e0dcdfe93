// Handler of target jax_ep_latency_dispatch: a dispatch of latency mode, with its plan.

#include "cuda/decode/dispatch.h"
#include "ffi/cuda/device_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Error LatencyDispatch(cudaStream_t stream, int32_t device, const LatencyDispatchAttrs& attrs,
                           const DeviceLatencyDispatchBuffers& buffers) {
  Checker check("dispatch");
  ops::PlanArgs plan{};
  ops::DispatchArgs args{};
  CheckDeviceGroup(check, attrs.group, buffers.coords);
  if (check.ok()) Decode(check, attrs, buffers, plan, args);
  if (!check.ok()) return check.error();
  const int32_t kind = attrs.quantization + 4 * args.dense_output + 8 * (args.scales != nullptr) +
                       16 * (args.weights != nullptr);
  DeviceGroup group;
  if (auto error = PrepareGroup(
          attrs.group, buffers.coords, device, cuda::OpKind::kDispatch,
          AgreedOn(args.geometry, kind, attrs.alignment, attrs.expert_capacity), group);
      error.failure()) {
    return error;
  }
  cuda::DecodeDispatchParams params = cuda::ParamsOf(plan, args);
  params.group = group.params;
  params.inboxes = group.member->inboxes;
  const ops::Geometry& geometry = args.geometry;
  params.num_blocks = group.NumBlocks(
      attrs.group, cuda::UsefulDecodeBlocks(geometry.num_ranks, geometry.num_tokens));
  if (const char* expected = cuda::ObstacleOf(params)) {
    check.Fail("mode='latency'", expected, Describe(buffers.x) + " and " + Describe(buffers.topk));
    return check.error();
  }
  return ToError(cuda::LaunchDecodeDispatch(params, stream), "dispatch");
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_latency_dispatch_execute, LatencyDispatch, LATENCY_DISPATCH);

}  // namespace jax_ep
