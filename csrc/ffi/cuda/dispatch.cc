// Handlers of targets jax_ep_dispatch and jax_ep_dispatch_async on GPUs.

#include "ffi/cuda/async_targets.h"
#include "ffi/cuda/node_dispatch.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Error Dispatch(cudaStream_t stream, int32_t device, const DispatchAttrs& attrs,
                    const DeviceDispatchBuffers& buffers) {
  Checker check("dispatch");
  ops::DispatchArgs args{};
  CheckCall(check, attrs, buffers, args);
  if (!check.ok()) return check.error();
  DeviceGroup group;
  cuda::DispatchParams params;
  if (auto error = PrepareNodeDispatch(check, args, attrs.group, buffers.coords, device,
                                       buffers.scratch, /*begin=*/0, group, params);
      error.failure()) {
    return error;
  }
  SharedOperands shared(group, stream);
  return LaunchNodeDispatch(check, args, group, shared, stream, buffers.scratch.untyped_data(),
                            params, [] { return cudaSuccess; });
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_dispatch_execute, Dispatch, DISPATCH);
JAX_EP_DEFINE_ASYNC_CALL(jax_ep_dispatch_async_execute, Dispatch, DISPATCH);

}  // namespace jax_ep
