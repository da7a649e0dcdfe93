// The gradients of combine with fused weights, on a GPU (layout "expert").
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/core/group_params.h"
#include "cuda/rows/row_type.h"
#include "ops/combine_vjp.h"

namespace jax_ep::cuda {

// Symbols as in plan/routing.h; H is the hidden size.
struct CombineVjpParams {
  GroupParams group;
  RowType type;
  int32_t num_tokens;
  int32_t num_rows;
  int32_t capacity;
  int32_t hidden;
  const void* dy;            // [T, H], this rank's
  const void* rows;          // [C, H]
  const float* row_weights;  // [C]
  bool keeps_unused;         // gradients of rows without a source stay as they are
  const int32_t* recv_rows;  // [R * T, M]
  const int32_t* recv_src;   // [C]
  void* d_rows;              // [C, H]
  float* d_weights;          // [C]
  int32_t num_blocks;
};

// The parameters that follow from the op's arguments; the caller sets the group and the number of
// blocks. `dy` has this rank's address; peers may read it at another.
inline CombineVjpParams ParamsOf(const ops::CombineVjpArgs& args) {
  const ops::Geometry& geometry = args.geometry;
  CombineVjpParams params{};
  params.type = RowTypeOf(geometry.dtype);
  params.num_tokens = geometry.num_tokens;
  params.num_rows = geometry.rows_per_source();
  params.capacity = geometry.capacity;
  params.hidden = geometry.hidden;
  params.keeps_unused = args.unused_rows == ops::UnusedRows::kUndefined;
  params.dy = args.dy;
  params.rows = args.rows;
  params.row_weights = args.row_weights;
  params.recv_rows = args.handle.recv_rows;
  params.recv_src = args.handle.recv_src;
  params.d_rows = args.d_rows;
  params.d_weights = args.d_weights;
  return params;
}

// The longest row, in bytes, that the kernel's shared memory has room for.
int64_t MaxCombineVjpRowBytes();

cudaError_t LaunchCombineVjp(const CombineVjpParams& params, cudaStream_t stream);

cudaError_t LoadCombineVjp();

}  // namespace jax_ep::cuda
