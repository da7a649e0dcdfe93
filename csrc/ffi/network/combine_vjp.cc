// Handler of target jax_ep_network_combine_vjp.

#include "cuda/network/combine_vjp.h"

#include "ffi/network/network_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Error NetworkCombineVjp(cudaStream_t stream, int32_t device,
                             const NetworkCombineVjpAttrs& attrs,
                             const DeviceNetworkCombineVjpBuffers& buffers) {
  Checker check("combine_vjp");
  ops::CombineVjpArgs args{};
  CheckCall(check, attrs, buffers, args);
  if (!check.ok()) return check.error();
  NetworkGroup group;
  if (auto error = PrepareNetworkGroup(attrs.group, buffers.coords, device,
                                       cuda::OpKind::kCombineVjp, AgreedOn(args), group);
      error.failure()) {
    return error;
  }
  cuda::NetworkCombineVjpParams params = cuda::NetworkParamsOf(args);
  params.network = group.params;
  params.experts_per_host = args.geometry.num_experts / group.params.shape.num_hosts;
  SharedOperands shared(group.node, stream);
  params.dy = shared.Input("dy", args.dy, args.geometry.num_tokens * args.geometry.row_bytes());
  if (auto error = shared.error(); error.failure()) return error;
  params.num_blocks = group.node.NumBlocks(attrs.group, 64);
  check.Attribute("hidden", cuda::FitsNetworkCombineVjp(params),
                  "rows that a chunk of the network has room for", args.geometry.hidden);
  if (!check.ok()) return check.error();
  return ToError(cuda::LaunchNetworkCombineVjp(params, stream), "combine_vjp");
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_network_combine_vjp_execute, NetworkCombineVjp,
                          NETWORK_COMBINE_VJP);

}  // namespace jax_ep
