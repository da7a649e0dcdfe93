// Handler of target jax_ep_network_combine.

#include "cuda/network/combine.h"

#include "ffi/network/network_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Error NetworkCombine(cudaStream_t stream, int32_t device, const NetworkCombineAttrs& attrs,
                          const DeviceNetworkCombineBuffers& buffers) {
  Checker check("combine");
  ops::CombineArgs args{};
  CheckCall(check, attrs, buffers, args);
  if (!check.ok()) return check.error();
  NetworkGroup group;
  if (auto error = PrepareNetworkGroup(attrs.group, buffers.coords, device, cuda::OpKind::kCombine,
                                       AgreedOn(args), group);
      error.failure()) {
    return error;
  }
  cuda::NetworkCombineParams params = cuda::NetworkParamsOf(args);
  params.network = group.params;
  params.num_blocks = group.node.NumBlocks(attrs.group, 64);
  check.Attribute("hidden", cuda::FitsNetworkCombine(params),
                  "rows that a chunk of the network has room for", args.geometry.hidden);
  if (!check.ok()) return check.error();
  return ToError(cuda::LaunchNetworkCombine(params, stream), "combine");
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_network_combine_execute, NetworkCombine, NETWORK_COMBINE);

}  // namespace jax_ep
