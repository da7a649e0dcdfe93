// Handler of target jax_ep_latency_combine: a combine of latency mode.

#include "cuda/decode/combine.h"
#include "ffi/cuda/latency_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Error LatencyCombine(cudaStream_t stream, int32_t device, const LatencyCombineAttrs& attrs,
                          const DeviceLatencyCombineBuffers& buffers) {
  Checker check("combine");
  ops::CombineArgs args{};
  CheckCall(check, attrs, buffers, args);
  if (check.ok() && args.values != nullptr) {
    check.Fail("argument values", "none in latency mode", Describe(buffers.values));
  }
  if (!check.ok()) return check.error();
  DeviceGroup group;
  if (auto error = PrepareGroup(attrs.group, buffers.coords, device, cuda::OpKind::kCombine,
                                AgreedOn(args), group);
      error.failure()) {
    return error;
  }
  return LaunchLatency(check, group, attrs.group, args.geometry, cuda::ParamsOfDecode(args),
                       cuda::LaunchDecodeCombine, "combine", buffers.y, buffers.topk, stream);
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_latency_combine_execute, LatencyCombine, LATENCY_COMBINE);

}  // namespace jax_ep
