// Handler of target jax_ep_latency_dispatch: a dispatch of latency mode, with its plan.

#include "ffi/cuda/latency_call.h"

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
  return LaunchLatency(check, group, attrs.group, args.geometry, cuda::ParamsOf(plan, args),
                       cuda::LaunchDecodeDispatch, "dispatch", buffers.x, buffers.topk, stream);
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_latency_dispatch_execute, LatencyDispatch, LATENCY_DISPATCH);

}  // namespace jax_ep
