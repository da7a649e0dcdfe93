// Handlers of targets jax_ep_latency_combine, in one call, and jax_ep_latency_combine_start and
// jax_ep_latency_combine_done, in two: a combine of latency mode.

#include "cuda/decode/combine.h"
#include "ffi/cuda/latency_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

template <typename Buffers>
ffi::Error Combine(cudaStream_t stream, int32_t device, const CombineAttrs& attrs,
                   const Buffers& buffers, cuda::Calls calls) {
  Checker check("combine");
  ops::CombineArgs args{};
  CheckCall(check, attrs, buffers, args);
  if (check.ok() && args.values != nullptr) {
    check.Fail("argument values", "none in latency mode", "some");
  }
  if (!check.ok()) return check.error();
  return LaunchLatency(check, attrs.group, buffers.coords, device, cuda::OpKind::kCombine,
                       AgreedOn(args), args.geometry, calls, cuda::ParamsOfDecode(args),
                       cuda::LaunchDecodeCombine, "combine", buffers.rows, buffers.topk, stream);
}

ffi::Error LatencyCombine(cudaStream_t stream, int32_t device, const CombineAttrs& attrs,
                          const DeviceLatencyCombineBuffers& buffers) {
  return Combine(stream, device, attrs, buffers, cuda::Calls::kOne);
}

ffi::Error LatencyCombineStart(cudaStream_t stream, int32_t device, const CombineAttrs& attrs,
                               const DeviceLatencyCombineStartBuffers& buffers) {
  return Combine(stream, device, attrs, buffers, cuda::Calls::kStart);
}

ffi::Error LatencyCombineDone(cudaStream_t stream, int32_t device, const CombineAttrs& attrs,
                              const DeviceLatencyCombineDoneBuffers& buffers) {
  return Combine(stream, device, attrs, buffers, cuda::Calls::kDone);
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_latency_combine_execute, LatencyCombine, LATENCY_COMBINE);
JAX_EP_DEFINE_DEVICE_CALL(jax_ep_latency_combine_start_execute, LatencyCombineStart,
                          LATENCY_COMBINE_START);
JAX_EP_DEFINE_DEVICE_CALL(jax_ep_latency_combine_done_execute, LatencyCombineDone,
                          LATENCY_COMBINE_DONE);

}  // namespace jax_ep
