// Handlers of targets jax_ep_latency_dispatch, in one call, and jax_ep_latency_dispatch_start and
// jax_ep_latency_dispatch_done, in two: a dispatch of latency mode, with its plan.

#include "ffi/cuda/latency_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

template <typename Attrs, typename Buffers>
ffi::Error Dispatch(cudaStream_t stream, int32_t device, const Attrs& attrs, const Buffers& buffers,
                    cuda::Calls calls) {
  Checker check("dispatch");
  ops::PlanArgs plan{};
  ops::DispatchArgs args{};
  CheckDeviceGroup(check, attrs.group, buffers.coords);
  if (check.ok()) Decode(check, attrs, buffers, plan, args);
  if (!check.ok()) return check.error();
  const int32_t kind = attrs.quantization + 4 * args.dense_output + 8 * (args.scales != nullptr) +
                       16 * (args.weights != nullptr) + 32 * attrs.masked +
                       64 * attrs.packed_scales;
  return LaunchLatency(check, attrs.group, buffers.coords, device, cuda::OpKind::kDispatch,
                       AgreedOn(args.geometry, kind, attrs.alignment, attrs.expert_capacity),
                       args.geometry, calls, cuda::ParamsOf(plan, args), cuda::LaunchDecodeDispatch,
                       "dispatch", buffers.x, buffers.topk_idx, stream);
}

ffi::Error LatencyDispatch(cudaStream_t stream, int32_t device, const LatencyDispatchAttrs& attrs,
                           const DeviceLatencyDispatchBuffers& buffers) {
  return Dispatch(stream, device, attrs, buffers, cuda::Calls::kOne);
}

ffi::Error LatencyDispatchStart(cudaStream_t stream, int32_t device,
                                const LatencyDispatchStartAttrs& attrs,
                                const DeviceLatencyDispatchStartBuffers& buffers) {
  return Dispatch(stream, device, attrs, buffers, cuda::Calls::kStart);
}

ffi::Error LatencyDispatchDone(cudaStream_t stream, int32_t device,
                               const LatencyDispatchAttrs& attrs,
                               const DeviceLatencyDispatchDoneBuffers& buffers) {
  return Dispatch(stream, device, attrs, buffers, cuda::Calls::kDone);
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_latency_dispatch_execute, LatencyDispatch, LATENCY_DISPATCH);
JAX_EP_DEFINE_DEVICE_CALL(jax_ep_latency_dispatch_start_execute, LatencyDispatchStart,
                          LATENCY_DISPATCH_START);
JAX_EP_DEFINE_DEVICE_CALL(jax_ep_latency_dispatch_done_execute, LatencyDispatchDone,
                          LATENCY_DISPATCH_DONE);

}  // namespace jax_ep
