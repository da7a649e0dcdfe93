// The dispatch op on a GPU: every rank reads the rows that it needs from its peers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/core/group_params.h"
#include "cuda/rows/row_type.h"
#include "ops/dispatch.h"
#include "plan/routing.h"

namespace jax_ep::cuda {

// Symbols as in plan/routing.h; H is the hidden size.
struct DispatchParams {
  GroupParams group;
  plan::Layout layout;
  int32_t num_tokens;         // T
  int32_t top_k;              // K
  int32_t capacity;           // C
  int32_t num_rows;           // M, rows of a source at most
  int32_t row_bytes;          // of a row as it travels; a multiple of 16
  int64_t row_stride;         // bytes of a row of `rows`; row_bytes unless rows become dense
  int32_t scales_per_row;     // float32 that travel with each row; 0 without scales
  bool keeps_unused;          // rows without a source stay as they are
  const void* x;              // [T, H], this rank's
  const float* scales;        // [T, scales_per_row], or null
  const float* weights;       // [T, K], or null
  const int32_t* recv_rows;   // [R * T, M]
  const int32_t* recv_src;    // [C]
  const int32_t* expert_idx;  // [C, K] in layout "token"
  void* rows;                 // [C, row_stride]
  float* row_scales;          // [C, scales_per_row], or null: without scales, or if `dense`
  float* row_weights;         // [C] or [C, K], or null
  int32_t num_blocks;
  bool behind_plan;    // launched behind the push kernel of its plan, which is_followed
  uint32_t plan_tag;   // of that plan
  bool behind_cast;    // launched behind the cast of x, maybe itself behind a plan
  int32_t cast_chunk;  // TokensOfChunk (cast.h), then
  bool dense;          // rows that are cast become dense on their way; only with behind_cast
  RowType dense_type;  // their dtype in `rows`
};

// The parameters that follow from the op's arguments, if rows travel as they are; the caller sets
// the group and the number of blocks. `x`, `scales` and `weights` have this rank's addresses; peers
// may read them at others.
inline DispatchParams ParamsOf(const ops::DispatchArgs& args) {
  const ops::Geometry& geometry = args.geometry;
  DispatchParams params{};
  params.layout = geometry.layout;
  params.num_tokens = geometry.num_tokens;
  params.top_k = geometry.top_k;
  params.capacity = geometry.capacity;
  params.num_rows = geometry.rows_per_source();
  params.row_bytes = static_cast<int32_t>(geometry.row_bytes());
  params.row_stride = geometry.row_bytes();
  params.scales_per_row = args.scales != nullptr ? geometry.hidden / ops::kScaleBlock : 0;
  params.keeps_unused = args.unused_rows == ops::UnusedRows::kUndefined;
  params.x = args.x;
  params.scales = args.scales;
  params.weights = args.weights;
  params.recv_rows = args.handle.recv_rows;
  params.recv_src = args.handle.recv_src;
  params.expert_idx = args.handle.expert_idx;
  params.rows = args.rows;
  params.row_scales = args.row_scales;
  params.row_weights = args.row_weights;
  return params;
}

// Moves rows as they are, or makes them dense on their way. Behind a plan or a cast it is a kernel
// that begins early (core/launch.cuh). On failure every byte of the rows and of row_weights is
// 0xff, which is NaN in every dtype.
cudaError_t LaunchDispatch(const DispatchParams& params, cudaStream_t stream);

cudaError_t LoadDispatch();

// Whether shared memory has room for rows of this length, with their scales.
bool FitsDispatch(const DispatchParams& params);

}  // namespace jax_ep::cuda
