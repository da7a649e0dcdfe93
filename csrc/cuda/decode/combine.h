// Combine in latency mode on a GPU (README.md).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/core/divide.h"
#include "cuda/core/group_params.h"
#include "cuda/decode/inbox.h"
#include "cuda/rows/row_type.h"
#include "ops/combine.h"
#include "plan/routing.h"

namespace jax_ep::cuda {

// Symbols as in plan/routing.h; H is the hidden size.
struct DecodeCombineParams {
  GroupParams group;
  DecodeInboxes inboxes;
  Calls calls;
  uint32_t kind;  // SentOp
  DecodeSlots slots;
  RowType type;
  int32_t num_tokens;   // T
  int32_t top_k;        // K
  int32_t num_experts;  // E
  Divider by_num_local;
  int32_t capacity;          // C
  int32_t num_rows;          // M, rows of a source at most
  int32_t row_bytes;         // a multiple of 16
  const void* rows;          // [C, H]
  const float* row_weights;  // [C], or null
  const int32_t* topk;       // [T, K]
  const int32_t* dest_row;   // [T, K]
  const int32_t* recv_rows;  // [R * T, M]
  void* y;                   // [T, H]
  int32_t num_blocks;
};

// The parameters that follow from the op's arguments, which have no values; the caller sets the
// group, the inboxes, the calls and the number of blocks. Without y they are those of a start call.
DecodeCombineParams ParamsOfDecode(const ops::CombineArgs& args);

// Why latency mode cannot do this, or null. `inboxes` is set.
const char* ObstacleOf(const DecodeCombineParams& params);

// On failure every byte of y is 0xff, which is NaN in every dtype.
cudaError_t LaunchDecodeCombine(const DecodeCombineParams& params, cudaStream_t stream);

cudaError_t LoadDecodeCombine();

}  // namespace jax_ep::cuda
