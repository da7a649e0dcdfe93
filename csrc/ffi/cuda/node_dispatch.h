// How handlers launch a dispatch within a host.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/node/cast.h"
#include "cuda/node/dispatch.h"
#include "cuda/plan/plan.h"
#include "ffi/cuda/cast.h"

namespace jax_ep {

// Checks that `scratch` has the op's memory behind the first `begin` bytes, finds its group, and
// fills `params` with what the arguments and the group say.
inline ::xla::ffi::Error PrepareNodeDispatch(Checker& check, const ops::DispatchArgs& args,
                                             const GroupAttrs& attrs, ::xla::ffi::AnyBuffer coords,
                                             int32_t device, ::xla::ffi::AnyBuffer scratch,
                                             int64_t begin, DeviceGroup& group,
                                             cuda::DispatchParams& params) {
  CheckScratch(check, scratch, begin + CastBytes(args));
  if (!check.ok()) return check.error();
  if (auto error =
          PrepareGroup(attrs, coords, device, cuda::OpKind::kDispatch, AgreedOn(args), group);
      error.failure()) {
    return error;
  }
  const bool by_expert = args.geometry.layout == plan::Layout::kExpert;
  params = cuda::ParamsOf(args);
  params.group = group.params;
  params.num_blocks = group.NumBlocks(attrs, by_expert ? 64 : 24);
  return ::xla::ffi::Error::Success();
}

// Completes `params`, which have what the arguments and the group say, and launches the op, after
// `launch_plan`, which returns a cudaError_t. `params` say whether the op begins beside that plan.
template <typename LaunchPlan>
::xla::ffi::Error LaunchNodeDispatch(Checker& check, const ops::DispatchArgs& args,
                                     const DeviceGroup& group, SharedOperands& shared,
                                     cudaStream_t stream, void* scratch,
                                     cuda::DispatchParams& params, LaunchPlan&& launch_plan) {
  params.behind_cast = args.quantization != ops::Quantization::kNone;
  params.cast_chunk = cuda::TokensOfChunk(args.geometry.num_tokens);
  params.dense = params.behind_cast && args.dense_output;
  params.dense_type = cuda::RowTypeOf(args.geometry.dtype);
  const auto cast = [&](const cuda::QuantizeParams& rows) {
    if (const cudaError_t error = launch_plan(); error != cudaSuccess) return error;
    const int32_t pieces = (args.geometry.num_tokens - 1) / cuda::kTokensOfPiece + 1;
    // A block for each SM, more or less. They wait for nobody.
    const int32_t most = group.member->max_blocks + 24 / group.member->ranks_per_gpu;
    return cuda::LaunchCast({params.group, rows, std::min(pieces, most), params.behind_plan},
                            stream);
  };
  return MoveRows(check, args, shared, scratch, params, cuda::FitsDispatch, cast,
                  [&](const cuda::DispatchParams& ready) {
                    if (!ready.behind_cast) {
                      const cudaError_t error = launch_plan();
                      if (error != cudaSuccess) return error;
                    }
                    return cuda::LaunchDispatch(ready, stream);
                  });
}

}  // namespace jax_ep
