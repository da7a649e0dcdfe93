// Handlers of targets jax_ep_combine_vjp and jax_ep_combine_vjp_async on GPUs.

#include "cuda/node/combine_vjp.h"

#include "ffi/cuda/async_targets.h"
#include "ffi/cuda/device_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Error CombineVjp(cudaStream_t stream, int32_t device, const CombineVjpAttrs& attrs,
                      const DeviceCombineVjpBuffers& buffers) {
  Checker check("combine_vjp");
  ops::CombineVjpArgs args{};
  CheckCall(check, attrs, buffers, args);
  const ops::Geometry& geometry = args.geometry;
  check.Attribute("hidden", geometry.row_bytes() <= cuda::MaxCombineVjpRowBytes(),
                  "rows of about 100 KB at most on GPUs", geometry.hidden);
  if (!check.ok()) return check.error();
  DeviceGroup group;
  if (auto error = PrepareGroup(attrs.group, buffers.coords, device, cuda::OpKind::kCombineVjp,
                                AgreedOn(args), group);
      error.failure()) {
    return error;
  }
  cuda::CombineVjpParams params = cuda::ParamsOf(args);
  params.group = group.params;
  params.num_blocks = group.NumBlocks(attrs.group, 64);
  SharedOperands shared(group, stream);
  params.dy = shared.Input("dy", args.dy, geometry.num_tokens * geometry.row_bytes());
  if (auto error = shared.error(); error.failure()) return error;
  return ToError(cuda::LaunchCombineVjp(params, stream), "combine_vjp");
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_combine_vjp_execute, CombineVjp, COMBINE_VJP);
JAX_EP_DEFINE_ASYNC_CALL(jax_ep_combine_vjp_async_execute, CombineVjp, COMBINE_VJP);

}  // namespace jax_ep
