// Handler of target jax_ep_network_dispatch.

#include "cuda/network/dispatch.h"

#include "ffi/cuda/cast.h"
#include "ffi/network/network_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Error NetworkDispatch(cudaStream_t stream, int32_t device, const NetworkDispatchAttrs& attrs,
                           const DeviceNetworkDispatchBuffers& buffers) {
  Checker check("dispatch");
  ops::DispatchArgs args{};
  CheckCall(check, attrs, buffers, args);
  const cuda::DispatchScratch scratch = DispatchScratchOf(args);
  CheckScratch(check, buffers.scratch, scratch.sent + scratch.received);
  if (!check.ok()) return check.error();
  NetworkGroup group;
  if (auto error = PrepareNetworkGroup(attrs.group, buffers.coords, device, cuda::OpKind::kDispatch,
                                       AgreedOn(args), group);
      error.failure()) {
    return error;
  }
  cuda::NetworkDispatchParams params = cuda::NetworkParamsOf(args);
  params.network = group.params;
  params.experts_per_host = args.geometry.num_experts / group.params.shape.num_hosts;
  params.num_blocks = group.node.NumBlocks(attrs.group, 64);
  SharedOperands shared(group.node, stream);
  return MoveRows(
      check, args, shared, stream, buffers.scratch.untyped_data(), params,
      cuda::FitsNetworkDispatch,
      [&](const cuda::QuantizeParams& rows) { return cuda::LaunchQuantize(rows, stream); },
      [&](const cuda::NetworkDispatchParams& ready) {
        return cuda::LaunchNetworkDispatch(ready, stream);
      });
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_network_dispatch_execute, NetworkDispatch, NETWORK_DISPATCH);

}  // namespace jax_ep
