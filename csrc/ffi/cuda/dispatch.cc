// Handler of target jax_ep_dispatch on GPUs.

#include "cuda/node/dispatch.h"

#include "cuda/rows/quantize.h"
#include "ffi/cuda/device_call.h"

namespace jax_ep {

namespace ffi = ::xla::ffi;

namespace {

using Out = ffi::Result<ffi::AnyBuffer>;

// Rows in float8 with their scales, in scratch memory.
struct QuantizedRows {
  char* values;
  float* scales;

  // Bytes that `num_rows` rows take, with every part aligned for bulk copies.
  static int64_t Bytes(int64_t num_rows, int32_t hidden) {
    return Align(num_rows * hidden) + Align(num_rows * (hidden / cuda::kScaleBlock) * 4);
  }

  static QuantizedRows At(char* memory, int64_t num_rows, int32_t hidden) {
    return {memory, reinterpret_cast<float*>(memory + Align(num_rows * hidden))};
  }

 private:
  static int64_t Align(int64_t bytes) { return (bytes + 127) / 128 * 128; }
};

ffi::Error Dispatch(cudaStream_t stream, int32_t device, DispatchAttrs attrs, ffi::AnyBuffer x,
                    ffi::AnyBuffer scales, ffi::AnyBuffer weights, ffi::AnyBuffer topk,
                    ffi::AnyBuffer dest_row, ffi::AnyBuffer recv_rows, ffi::AnyBuffer recv_src,
                    ffi::AnyBuffer expert_idx, ffi::AnyBuffer coords, Out rows, Out row_scales,
                    Out row_weights, Out scratch) {
  Checker check("dispatch");
  cpu::DispatchArgs args{};
  DecodeDispatch(check, attrs, {topk, dest_row, recv_rows, recv_src, expert_idx},
                 {x, scales, weights, *rows, *row_scales, *row_weights}, args);
  const cpu::Geometry& geometry = args.geometry;
  const bool quantize = args.quantization != cpu::Quantization::kNone;
  const bool dequantize = quantize && args.dense_output;
  const int64_t sent_bytes =
      quantize ? QuantizedRows::Bytes(geometry.num_tokens, geometry.hidden) : 0;
  const int64_t received_bytes =
      dequantize ? int64_t{geometry.capacity} * (geometry.hidden / cuda::kScaleBlock) * 4 : 0;
  CheckScratch(check, *scratch, sent_bytes + received_bytes);
  DeviceGroup group;
  if (auto error =
          PrepareGroup(check, attrs.group, coords, device, cuda::OpKind::kDispatch,
                       {geometry.num_tokens, geometry.top_k, geometry.capacity, geometry.hidden,
                        static_cast<int64_t>(geometry.dtype), attrs.quantization,
                        args.weights != nullptr, static_cast<int64_t>(geometry.layout)},
                       group);
      error.failure()) {
    return error;
  }
  cuda::DispatchParams params{};
  params.group = group.params;
  SharedOperands shared(group, stream);
  const bool by_expert = geometry.layout == plan::Layout::kExpert;
  params.layout = geometry.layout;
  params.num_tokens = geometry.num_tokens;
  params.top_k = geometry.top_k;
  params.capacity = geometry.capacity;
  params.num_rows = geometry.rows_per_source();
  params.row_bytes = static_cast<int32_t>(geometry.row_bytes());
  params.row_stride = geometry.row_bytes();
  const int64_t num_scales = int64_t{geometry.num_tokens} * (geometry.hidden / cuda::kScaleBlock);
  if (!quantize) {
    params.x = shared.Input("x", args.x, geometry.num_tokens * geometry.row_bytes());
    params.scales = shared.Input("scales", args.scales, num_scales * sizeof(float));
  }
  params.scales_per_row = args.scales != nullptr ? geometry.hidden / cuda::kScaleBlock : 0;
  params.weights = shared.Input("weights", args.weights,
                                int64_t{geometry.num_tokens} * geometry.top_k * sizeof(float));
  params.recv_rows = args.handle.recv_rows;
  params.recv_src = args.handle.recv_src;
  params.expert_idx = args.handle.expert_idx;
  params.rows = args.rows;
  params.row_scales = args.row_scales;
  params.row_weights = args.row_weights;
  params.num_blocks = group.NumBlocks(attrs.group, by_expert ? 64 : 24);

  char* memory = static_cast<char*>(scratch->untyped_data());
  char* sent_memory = shared.Scratch("scratch", memory, sent_bytes);
  if (auto error = shared.error(); error.failure()) return error;
  if (quantize) {
    const QuantizedRows sent = QuantizedRows::At(sent_memory, geometry.num_tokens, geometry.hidden);
    const cuda::QuantizeParams quantize_params{RowTypeOf(geometry.dtype),
                                               args.quantization == cpu::Quantization::kFp8Ue8m0,
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
    params.scales_per_row = geometry.hidden / cuda::kScaleBlock;
    params.row_bytes = geometry.hidden;
    params.row_stride = geometry.hidden;
  }
  check.Attribute("hidden", cuda::FitsDispatch(params), "rows that fit shared memory",
                  geometry.hidden);
  if (!check.ok()) return ToError(check.status());
  if (!dequantize) return ToError(cuda::LaunchDispatch(params, stream), "dispatch");
  // Float8 rows are received in the ends of the rows that they become.
  const int32_t row_bytes = static_cast<int32_t>(geometry.row_bytes());
  params.rows = static_cast<char*>(args.rows) + (row_bytes - geometry.hidden);
  params.row_stride = row_bytes;
  params.row_scales = reinterpret_cast<float*>(memory + sent_bytes);
  if (auto error = ToError(cuda::LaunchDispatch(params, stream), "dispatch"); error.failure()) {
    return error;
  }
  const cuda::DequantizeParams dequantize_params{RowTypeOf(geometry.dtype), geometry.capacity,
                                                 geometry.hidden, params.row_scales, args.rows};
  return ToError(cuda::LaunchDequantize(dequantize_params, stream), "dispatch");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_dispatch_execute, Dispatch,
                              BindDeviceCall<DispatchAttrs>()
                                  .Arg<ffi::AnyBuffer>()   // x
                                  .Arg<ffi::AnyBuffer>()   // scales
                                  .Arg<ffi::AnyBuffer>()   // weights
                                  .Arg<ffi::AnyBuffer>()   // topk
                                  .Arg<ffi::AnyBuffer>()   // dest_row
                                  .Arg<ffi::AnyBuffer>()   // recv_rows
                                  .Arg<ffi::AnyBuffer>()   // recv_src
                                  .Arg<ffi::AnyBuffer>()   // expert_idx
                                  .Arg<ffi::AnyBuffer>()   // coords
                                  .Ret<ffi::AnyBuffer>()   // rows
                                  .Ret<ffi::AnyBuffer>()   // row_scales
                                  .Ret<ffi::AnyBuffer>()   // row_weights
                                  .Ret<ffi::AnyBuffer>(),  // scratch
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
