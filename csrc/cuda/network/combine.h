// The combine op of a group that spans hosts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/network/params.h"
#include "cuda/network/routes.h"
#include "cuda/rows/row_type.h"
#include "ops/combine.h"
#include "plan/routing.h"

namespace jax_ep::cuda {

// Symbols as in plan/routing.h; H is the hidden size.
struct NetworkCombineParams {
  NetworkParams network;
  NetworkRoutes routes;
  plan::Layout layout;
  RowType type;
  int32_t num_tokens;         // T
  int32_t top_k;              // K
  int32_t row_bytes;          // a multiple of 16
  const void* rows;           // [C, H], this rank's
  const float* row_weights;   // [C], or null: the sum is plain
  const float* values;        // [C] or [C, K], or null
  const int32_t* recv_src;    // [C]
  const int32_t* expert_idx;  // [C, K] in layout "token"
  void* y;                    // [T, H]
  float* home;                // [T, K], or null
  int32_t num_blocks;         // the same on all ranks
};

// What the arguments of the op say; the network and the number of blocks are left.
inline NetworkCombineParams NetworkParamsOf(const ops::CombineArgs& args) {
  const ops::Geometry& geometry = args.geometry;
  NetworkCombineParams params{};
  params.routes = NetworkRoutes::Of(args.handle);
  params.layout = geometry.layout;
  params.type = RowTypeOf(geometry.dtype);
  params.num_tokens = geometry.num_tokens;
  params.top_k = geometry.top_k;
  params.row_bytes = static_cast<int32_t>(geometry.row_bytes());
  params.rows = args.rows;
  params.row_weights = args.row_weights;
  params.values = args.values;
  params.recv_src = args.handle.recv_src;
  params.expert_idx = args.handle.expert_idx;
  params.y = args.y;
  params.home = args.home;
  return params;
}

// Rows of a token are added in float32 and rounded to the type of rows: on each rank, in the order
// of its entries; of each host, in the order of its ranks; at home, in the order of the hosts. On
// failure every byte of y and home is 0xff, which is NaN in every dtype.
cudaError_t LaunchNetworkCombine(const NetworkCombineParams& params, cudaStream_t stream);

cudaError_t LoadNetworkCombine();

// Whether a chunk has room for a row of this length with its values.
bool FitsNetworkCombine(const NetworkCombineParams& params);

}  // namespace jax_ep::cuda
