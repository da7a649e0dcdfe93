// The fused cast of a dispatch: rows travel in float8.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/rows/quantize.h"
#include "ffi/cuda/device_call.h"
#include "ops/dispatch.h"

namespace jax_ep {

// Bytes of scratch memory for the rows that travel in float8, with their scales.
inline int64_t CastBytes(const ops::DispatchArgs& args) {
  if (args.quantization == ops::Quantization::kNone) return 0;
  return cuda::QuantizedRows::Bytes(args.geometry.num_tokens, args.geometry.hidden);
}

// Launches an op that moves rows, with the cast before it that `args` ask for. `scratch` is memory
// of CastBytes(), which the ranks of this host read. `cast` takes QuantizeParams and launches the
// cast before the op; `launch` takes the params. Both return a cudaError_t. `fits` says whether the
// kernel has room for such rows.
template <typename Params, typename Fits, typename Cast, typename Launch>
::xla::ffi::Error MoveRows(Checker& check, const ops::DispatchArgs& args, SharedOperands& shared,
                           void* scratch, Params& params, Fits&& fits, Cast&& cast,
                           Launch&& launch) {
  const ops::Geometry& geometry = args.geometry;
  const bool quantize = args.quantization != ops::Quantization::kNone;
  if (!quantize) {
    const int64_t num_scales = int64_t{geometry.num_tokens} * params.scales_per_row;
    params.x = shared.Input("x", args.x, geometry.num_tokens * geometry.row_bytes());
    params.scales = shared.Input("scales", args.scales, num_scales * sizeof(float));
  }
  params.weights = shared.Input("weights", args.weights,
                                int64_t{geometry.num_tokens} * geometry.top_k * sizeof(float));
  char* const sent_memory = shared.Scratch("scratch", static_cast<char*>(scratch), CastBytes(args));
  if (auto error = shared.error(); error.failure()) return error;
  const cuda::QuantizedRows sent =
      cuda::QuantizedRows::At(sent_memory, geometry.num_tokens, geometry.hidden);
  if (quantize) {
    params.x = sent.values;
    params.scales = sent.scales;
    params.scales_per_row = geometry.hidden / ops::kScaleBlock;
    params.row_bytes = geometry.hidden;
    params.row_stride = args.dense_output ? geometry.row_bytes() : geometry.hidden;
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
  const cudaError_t error = cast(quantize_params);
  return ToError(error == cudaSuccess ? launch(params) : error, "dispatch");
}

}  // namespace jax_ep
