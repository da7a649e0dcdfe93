// The gradients of combine with fused weights, of a group that spans hosts (layout "expert").
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/network/params.h"
#include "cuda/network/routes.h"
#include "cuda/rows/row_type.h"
#include "ops/combine_vjp.h"

namespace jax_ep::cuda {

// Symbols as in plan/routing.h; H is the hidden size.
struct NetworkCombineVjpParams {
  NetworkParams network;
  NetworkRoutes routes;
  RowType type;
  int32_t num_tokens;        // T
  int32_t top_k;             // K
  int32_t experts_per_host;  // E / P
  int32_t capacity;          // C
  int32_t hidden;            // H; a row is a multiple of 16 bytes
  bool keeps_unused;         // gradients of rows without a source stay as they are
  const void* dy;            // [T, H], this rank's
  const void* rows;          // [C, H]
  const float* row_weights;  // [C]
  const int32_t* recv_src;   // [C]
  void* d_rows;              // [C, H]
  float* d_weights;          // [C]
  int32_t num_blocks;        // the same on all ranks
};

// What the arguments of the op say; the network, experts_per_host and the number of blocks are
// left. `dy` is where this rank has it: the ranks of its host may read it elsewhere.
inline NetworkCombineVjpParams NetworkParamsOf(const ops::CombineVjpArgs& args) {
  const ops::Geometry& geometry = args.geometry;
  NetworkCombineVjpParams params{};
  params.routes = NetworkRoutes::Of(args.handle);
  params.type = RowTypeOf(geometry.dtype);
  params.num_tokens = geometry.num_tokens;
  params.top_k = geometry.top_k;
  params.capacity = geometry.capacity;
  params.hidden = geometry.hidden;
  params.keeps_unused = args.unused_rows == ops::UnusedRows::kUndefined;
  params.dy = args.dy;
  params.rows = args.rows;
  params.row_weights = args.row_weights;
  params.recv_src = args.handle.recv_src;
  params.d_rows = args.d_rows;
  params.d_weights = args.d_weights;
  return params;
}

// The gradients of each row and its weight are those of rows/gradients.cuh, zeros where a row has
// no source. On failure every byte of d_rows and d_weights is 0xff, which is NaN in every dtype.
cudaError_t LaunchNetworkCombineVjp(const NetworkCombineVjpParams& params, cudaStream_t stream);

cudaError_t LoadNetworkCombineVjp();

// Whether a chunk has room for a row of this length.
bool FitsNetworkCombineVjp(const NetworkCombineVjpParams& params);

}  // namespace jax_ep::cuda
