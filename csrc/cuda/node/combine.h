// The combine op on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/core/group_params.h"
#include "cuda/rows/row_type.h"
#include "ops/combine.h"
#include "plan/routing.h"

namespace jax_ep::cuda {

// Symbols as in plan/routing.h; H is the hidden size.
struct CombineParams {
  GroupParams group;
  plan::Layout layout;
  RowType type;
  int32_t num_tokens;        // T
  int32_t top_k;             // K
  int32_t num_experts;       // E
  int32_t capacity;          // C
  int32_t num_rows;          // M, rows of a source at most
  int32_t hidden;            // H
  const void* rows;          // [C, H], this rank's
  const float* row_weights;  // [C], or null
  const float* values;       // [C] or [C, K], or null
  const int32_t* topk;       // [T, K]
  const int32_t* dest_row;   // [T, K]
  const int32_t* recv_rows;  // [R * T, M]
  void* y;                   // [T, H]
  float* home;               // [T, K], or null
  int32_t num_blocks;
};

// The parameters that follow from the op's arguments; the caller sets the group and the number of
// blocks. `rows` and `values` have this rank's addresses; peers may read them at others.
inline CombineParams ParamsOf(const ops::CombineArgs& args) {
  const ops::Geometry& geometry = args.geometry;
  CombineParams params{};
  params.layout = geometry.layout;
  params.type = RowTypeOf(geometry.dtype);
  params.num_tokens = geometry.num_tokens;
  params.top_k = geometry.top_k;
  params.num_experts = geometry.num_experts;
  params.capacity = geometry.capacity;
  params.num_rows = geometry.rows_per_source();
  params.hidden = geometry.hidden;
  params.rows = args.rows;
  params.row_weights = args.row_weights;
  params.values = args.values;
  params.topk = args.handle.topk;
  params.dest_row = args.handle.dest_row;
  params.recv_rows = args.handle.recv_rows;
  params.y = args.y;
  params.home = args.home;
  return params;
}

// On failure every byte of y and home is 0xff, which is NaN in every dtype.
cudaError_t LaunchCombine(const CombineParams& params, cudaStream_t stream);

cudaError_t LoadCombine();

}  // namespace jax_ep::cuda
