// Handler of target jax_ep_dispatch on GPUs.

#include "cuda/node/dispatch.h"

#include "cuda/rows/quantize.h"
#include "ffi/cuda/device_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

ffi::Error Dispatch(cudaStream_t stream, int32_t device, const DispatchAttrs& attrs,
                    const DeviceDispatchBuffers& buffers) {
  Checker check("dispatch");
  ops::DispatchArgs args{};
  CheckCall(check, attrs, buffers, args);
  const ops::Geometry& geometry = args.geometry;
  const bool quantize = args.quantization != ops::Quantization::kNone;
  const bool dequantize = quantize && args.dense_output;
  const cuda::DispatchScratch scratch = cuda::DispatchScratchOf(
      geometry.num_tokens, geometry.hidden, geometry.capacity, quantize, args.dense_output);
  CheckScratch(check, buffers.scratch, scratch.sent + scratch.received);
  if (!check.ok()) return check.error();
  DeviceGroup group;
  if (auto error = PrepareGroup(attrs.group, buffers.coords, device, cuda::OpKind::kDispatch,
                                AgreedOn(args), group);
      error.failure()) {
    return error;
  }
  const bool by_expert = geometry.layout == plan::Layout::kExpert;
  cuda::DispatchParams params = cuda::ParamsOf(args);
  params.group = group.params;
  params.num_blocks = group.NumBlocks(attrs.group, by_expert ? 64 : 24);
  SharedOperands shared(group, stream);
  if (!quantize) {
    const int64_t num_scales = int64_t{geometry.num_tokens} * params.scales_per_row;
    params.x = shared.Input("x", args.x, geometry.num_tokens * geometry.row_bytes());
    params.scales = shared.Input("scales", args.scales, num_scales * sizeof(float));
  }
  params.weights = shared.Input("weights", args.weights,
                                int64_t{geometry.num_tokens} * geometry.top_k * sizeof(float));

  char* memory = static_cast<char*>(buffers.scratch.untyped_data());
  char* sent_memory = shared.Scratch("scratch", memory, scratch.sent);
  if (auto error = shared.error(); error.failure()) return error;
  if (quantize) {
    const cuda::QuantizedRows sent =
        cuda::QuantizedRows::At(sent_memory, geometry.num_tokens, geometry.hidden);
    const cuda::QuantizeParams quantize_params{cuda::RowTypeOf(geometry.dtype),
                                               args.quantization == ops::Quantization::kFp8Ue8m0,
                                               geometry.num_tokens,
                                               geometry.hidden,
                                               args.x,
                                               sent.values,
                                               sent.scales};
    if (auto error = ToError(cuda::LaunchQuantize(quantize_params, stream), "dispatch");
        error.failure()) {
      return error;
    }
    params.x = sent.values;
    params.scales = sent.scales;
    params.scales_per_row = geometry.hidden / ops::kScaleBlock;
    params.row_bytes = geometry.hidden;
    params.row_stride = geometry.hidden;
  }
  check.Attribute("hidden", cuda::FitsDispatch(params), "rows that fit shared memory",
                  geometry.hidden);
  if (!check.ok()) return check.error();
  if (!dequantize) return ToError(cuda::LaunchDispatch(params, stream), "dispatch");
  // Float8 rows are received in the ends of the rows that they become.
  const int32_t row_bytes = static_cast<int32_t>(geometry.row_bytes());
  params.rows = static_cast<char*>(args.rows) + (row_bytes - geometry.hidden);
  params.row_stride = row_bytes;
  params.row_scales = reinterpret_cast<float*>(memory + scratch.sent);
  if (auto error = ToError(cuda::LaunchDispatch(params, stream), "dispatch"); error.failure()) {
    return error;
  }
  const cuda::DequantizeParams dequantize_params{cuda::RowTypeOf(geometry.dtype), geometry.capacity,
                                                 geometry.hidden, params.row_scales, args.rows};
  return ToError(cuda::LaunchDequantize(dequantize_params, stream), "dispatch");
}

}  // namespace

JAX_EP_DEFINE_DEVICE_CALL(jax_ep_dispatch_execute, Dispatch, DISPATCH);

}  // namespace jax_ep
