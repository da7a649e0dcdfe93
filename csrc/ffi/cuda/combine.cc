// Handlers of targets jax_ep_combine and jax_ep_combine_async on GPUs.

#include "cuda/node/combine.h"

#include "ffi/cuda/async_targets.h"
#include "ffi/cuda/device_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Error Combine(cudaStream_t stream, int32_t device, const CombineAttrs& attrs,
                   const DeviceCombineBuffers& buffers) {
  Checker check("combine");
  ops::CombineArgs args{};
  CheckCall(check, attrs, buffers, args);
  const ops::Geometry& geometry = args.geometry;
  const bool by_expert = geometry.layout == plan::Layout::kExpert;
  check.Attribute("hidden",
                  !by_expert || cuda::RingSlots(geometry.num_ranks, geometry.row_bytes()) > 0,
                  "rows that fit the ring of sums", geometry.hidden);
  if (!check.ok()) return check.error();
  DeviceGroup group;
  if (auto error = PrepareGroup(attrs.group, buffers.coords, device, cuda::OpKind::kCombine,
                                AgreedOn(args), group);
      error.failure()) {
    return error;
  }
  cuda::CombineParams params = cuda::ParamsOf(args);
  params.group = group.params;
  params.num_blocks = group.NumBlocks(attrs.group, by_expert ? 64 : 24);
  SharedOperands shared(group, stream);
  // Sums of rows, in layout "expert", reach home through its ring.
  if (!by_expert) {
    params.rows = shared.Input("rows", args.rows, geometry.capacity * geometry.row_bytes());
  }
  params.values =
      shared.Input("values", args.values,
                   int64_t{geometry.capacity} * (by_expert ? 1 : geometry.top_k) * sizeof(float));
  if (auto error = shared.error(); error.failure()) return error;
  return ToError(cuda::LaunchCombine(params, stream), "combine");
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_combine_execute, Combine, COMBINE);
JAX_EP_DEFINE_ASYNC_CALL(jax_ep_combine_async_execute, Combine, COMBINE);

}  // namespace jax_ep
