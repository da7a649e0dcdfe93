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
  const ops::Geometry& geometry = args.geometry;
  const int64_t cast_bytes = CastBytes(args);
  const bool dequantize = cast_bytes > 0 && args.dense_output;
  CheckScratch(check, buffers.scratch,
               cast_bytes + (dequantize ? cuda::DequantizeParams::ScaleBytes(geometry.capacity,
                                                                             geometry.hidden)
                                        : 0));
  if (!check.ok()) return check.error();
  NetworkGroup group;
  if (auto error = PrepareNetworkGroup(attrs.group, buffers.coords, device, cuda::OpKind::kDispatch,
                                       AgreedOn(args), group);
      error.failure()) {
    return error;
  }
  cuda::NetworkDispatchParams params = cuda::NetworkParamsOf(args);
  params.network = group.params;
  params.experts_per_host = geometry.num_experts / group.params.shape.num_hosts;
  params.num_blocks = group.node.NumBlocks(attrs.group, 64);
  SharedOperands shared(group.node, stream);
  char* const scratch = static_cast<char*>(buffers.scratch.untyped_data());
  return MoveRows(
      check, args, shared, scratch, params, cuda::FitsNetworkDispatch,
      [&](const cuda::QuantizeParams& rows) { return cuda::LaunchQuantize(rows, stream); },
      [&](cuda::NetworkDispatchParams& ready) {
        if (!dequantize) return cuda::LaunchNetworkDispatch(ready, stream);
        // Float8 rows are received in the ends of the rows that they become.
        ready.rows = static_cast<char*>(args.rows) + (ready.row_stride - ready.row_bytes);
        ready.row_scales = reinterpret_cast<float*>(scratch + cast_bytes);
        const cudaError_t error = cuda::LaunchNetworkDispatch(ready, stream);
        if (error != cudaSuccess) return error;
        return cuda::LaunchDequantize({cuda::RowTypeOf(geometry.dtype), geometry.capacity,
                                       geometry.hidden, ready.row_scales, args.rows},
                                      stream);
      });
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_network_dispatch_execute, NetworkDispatch, NETWORK_DISPATCH);

}  // namespace jax_ep
