// Handlers of targets jax_ep_dispatch and jax_ep_dispatch_async on GPUs.

#include "cuda/node/dispatch.h"

#include "ffi/cuda/async_targets.h"
#include "ffi/cuda/cast.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Error Dispatch(cudaStream_t stream, int32_t device, const DispatchAttrs& attrs,
                    const DeviceDispatchBuffers& buffers) {
  Checker check("dispatch");
  ops::DispatchArgs args{};
  CheckCall(check, attrs, buffers, args);
  const cuda::DispatchScratch scratch = DispatchScratchOf(args);
  CheckScratch(check, buffers.scratch, scratch.sent + scratch.received);
  if (!check.ok()) return check.error();
  DeviceGroup group;
  if (auto error = PrepareGroup(attrs.group, buffers.coords, device, cuda::OpKind::kDispatch,
                                AgreedOn(args), group);
      error.failure()) {
    return error;
  }
  cuda::DispatchParams params = cuda::ParamsOf(args);
  params.group = group.params;
  params.num_blocks = DispatchBlocks(args, attrs.group, group);
  params.behind_cast = args.quantization != ops::Quantization::kNone;
  SharedOperands shared(group, stream);
  return MoveRows(
      check, args, shared, stream, buffers.scratch.untyped_data(), params, cuda::FitsDispatch,
      [&](const cuda::DispatchParams& ready) { return cuda::LaunchDispatch(ready, stream); });
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_dispatch_execute, Dispatch, DISPATCH);
JAX_EP_DEFINE_ASYNC_CALL(jax_ep_dispatch_async_execute, Dispatch, DISPATCH);

}  // namespace jax_ep
