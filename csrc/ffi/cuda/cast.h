// The fused cast of a dispatch: rows travel in float8, and may become dense again.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/rows/quantize.h"
#include "ffi/cuda/device_call.h"
#include "ops/dispatch.h"

namespace jax_ep {

inline cuda::DispatchScratch DispatchScratchOf(const ops::DispatchArgs& args) {
  const ops::Geometry& geometry = args.geometry;
  return cuda::DispatchScratchOf(geometry.num_tokens, geometry.hidden, geometry.capacity,
                                 args.quantization != ops::Quantization::kNone, args.dense_output);
}

// Launches an op that moves rows, with the casts before and after it that `args` ask for. `scratch`
// is the op's scratch memory, whose first part the ranks of this host read. `cast` takes
// QuantizeParams and launches the cast before the op; `launch` takes the params. Both return a
// cudaError_t. `fits` says whether the kernel has room for such rows.
template <typename Params, typename Fits, typename Cast, typename Launch>
::xla::ffi::Error MoveRows(Checker& check, const ops::DispatchArgs& args, SharedOperands& shared,
                           cudaStream_t stream, void* scratch, Params& params, Fits&& fits,
                           Cast&& cast, Launch&& launch) {
  const ops::Geometry& geometry = args.geometry;
  const bool quantize = args.quantization != ops::Quantization::kNone;
  const cuda::DispatchScratch sizes = DispatchScratchOf(args);
  if (!quantize) {
    const int64_t num_scales = int64_t{geometry.num_tokens} * params.scales_per_row;
    params.x = shared.Input("x", args.x, geometry.num_tokens * geometry.row_bytes());
    params.scales = shared.Input("scales", args.scales, num_scales * sizeof(float));
  }
  params.weights = shared.Input("weights", args.weights,
                                int64_t{geometry.num_tokens} * geometry.top_k * sizeof(float));
  char* const memory = static_cast<char*>(scratch);
  char* const sent_memory = shared.Scratch("scratch", memory, sizes.sent);
  if (auto error = shared.error(); error.failure()) return error;
  const cuda::QuantizedRows sent =
      cuda::QuantizedRows::At(sent_memory, geometry.num_tokens, geometry.hidden);
  if (quantize) {
    params.x = sent.values;
    params.scales = sent.scales;
    params.scales_per_row = geometry.hidden / ops::kScaleBlock;
    params.row_bytes = geometry.hidden;
    params.row_stride = geometry.hidden;
  }
  check.Attribute("hidden", fits(params), "rows that the kernel has room for", geometry.hidden);
  if (!check.ok()) return check.error();
  if (!quantize) return ToError(launch(params), "dispatch");
  const cuda::QuantizeParams quantize_params{cuda::RowTypeOf(geometry.dtype),
                                             args.quantization == ops::Quantization::kFp8Ue8m0,
                                             geometry.num_tokens,
                                             geometry.hidden,
                                             args.x,
                                             sent.values,
                                             sent.scales};
  if (auto error = ToError(cast(quantize_params), "dispatch");
      error.failure() || !args.dense_output) {
    return error.failure() ? error : ToError(launch(params), "dispatch");
  }
  // Float8 rows are received in the ends of the rows that they become.
  const int32_t row_bytes = static_cast<int32_t>(geometry.row_bytes());
  params.rows = static_cast<char*>(args.rows) + (row_bytes - geometry.hidden);
  params.row_stride = row_bytes;
  params.row_scales = reinterpret_cast<float*>(memory + sizes.sent);
  if (auto error = ToError(launch(params), "dispatch"); error.failure()) return error;
  const cuda::DequantizeParams dequantize_params{cuda::RowTypeOf(geometry.dtype), geometry.capacity,
                                                 geometry.hidden, params.row_scales, args.rows};
  return ToError(cuda::LaunchDequantize(dequantize_params, stream), "dispatch");
}

}  // namespace jax_ep
