// The cast of a dispatch's rows to float8, which runs beside the dispatch: it goes through the
// tokens in order, a chunk at a time, and tells all ranks when a chunk is there.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/core/group_params.h"
#include "cuda/rows/quantize.h"

namespace jax_ep::cuda {

struct CastParams {
  GroupParams group;
  QuantizeParams rows;  // `values` and `scales` are where peers read them
  int32_t num_blocks;
  bool behind_plan;  // launched behind the push kernel of a plan, which is_followed
};

// What blocks take in turn.
constexpr int32_t kTokensOfPiece = 8;

// Tokens of a chunk: a whole number of pieces.
JAX_EP_HOST_DEVICE int32_t TokensOfChunk(int32_t num_tokens) {
  const int32_t pieces = (num_tokens + kTokensOfPiece - 1) / kTokensOfPiece;
  return (pieces + kCastChunks - 1) / kCastChunks * kTokensOfPiece;
}

// A dispatch is launched behind it. Behind a plan it begins early (core/launch.cuh), and its end is
// that of both.
cudaError_t LaunchCast(const CastParams& params, cudaStream_t stream);

cudaError_t LoadCast();

}  // namespace jax_ep::cuda
