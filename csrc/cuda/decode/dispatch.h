// Dispatch in latency mode on a GPU: the plan and the rows in one launch, or in two (README.md).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/core/divide.h"
#include "cuda/core/group_params.h"
#include "cuda/decode/inbox.h"
#include "cuda/rows/row_type.h"
#include "ops/dispatch.h"
#include "ops/plan.h"
#include "plan/build_plan.h"
#include "plan/routing.h"

namespace jax_ep::cuda {

// Symbols as in plan/routing.h; H is the hidden size, S the scales of a row, H / 128.
struct DecodeDispatchParams {
  GroupParams group;
  DecodeInboxes inboxes;
  Calls calls;
  uint32_t kind;  // SentOp
  DecodeSlots slots;
  plan::PlanShape shape;
  int32_t num_local;  // L
  Divider by_num_local;
  int32_t num_rows;         // M, rows of a source at most
  int32_t row_bytes;        // of a row as it travels; a multiple of 16
  int32_t out_row_bytes;    // of a row of `rows`
  int32_t scales_per_row;   // S of rows that travel with scales, else 0
  RowType type;             // of x, if rows are cast to float8 on their way
  bool cast;                // to float8
  bool ue8m0;               // the scales of the cast are powers of two
  bool dense;               // rows that were cast become x's type again
  bool keeps_unused;        // rows without a source stay as they are
  const void* x;            // [T, H]
  const float* scales;      // [T, S] of x, or null
  const float* weights;     // [T, K], or null
  plan::RankPlan plan;      // the routes, and the results that are the handle
  void* rows;               // [C, out_row_bytes]
  float* row_scales;        // [C, S], or null
  uint32_t* packed_scales;  // instead of row_scales, as ops::PackedScales says, or null
  ops::PackedScales packed;
  float* row_weights;  // [C] or [C, K], or null
  int32_t num_blocks;

  // Groups of rows whose scales are packed.
  JAX_EP_HOST_DEVICE int32_t num_packed() const { return shape.capacity / packed.rows; }
};

// The parameters that follow from the arguments of a plan and of the dispatch along it, whose
// handle does not count; the caller sets the group, the inboxes, the calls and the number of
// blocks. Without results they are those of a start call.
DecodeDispatchParams ParamsOf(const ops::PlanArgs& plan, const ops::DispatchArgs& args);

// Why latency mode cannot do this, or null. `inboxes` is set.
const char* ObstacleOf(const DecodeDispatchParams& params);

// Blocks that an op with so many tokens has use for.
int32_t UsefulDecodeBlocks(int32_t num_ranks, int32_t num_tokens);

// On failure every byte of all results is 0xff: NaN in every dtype of rows, and -1.
cudaError_t LaunchDecodeDispatch(const DecodeDispatchParams& params, cudaStream_t stream);

cudaError_t LoadDecodeDispatch();

}  // namespace jax_ep::cuda
