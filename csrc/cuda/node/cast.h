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

// Tokens of a chunk. As few as there are words for: the sooner a chunk is there, the sooner links
// are busy.
JAX_EP_HOST_DEVICE int32_t CastChunk(int32_t num_tokens) {
  constexpr int32_t kFewest = 8, kMostChunks = kMaxRingSlots * kMaxParts;
  const int32_t even = (num_tokens - 1) / kMostChunks + 1;
  return even > kFewest ? even : kFewest;
}

// A dispatch is launched behind it. Behind a plan it begins early (core/launch.cuh), and its end is
// that of both.
cudaError_t LaunchCast(const CastParams& params, cudaStream_t stream);

cudaError_t LoadCast();

}  // namespace jax_ep::cuda
