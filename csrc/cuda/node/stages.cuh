// The stages in shared memory through which a mover of the dispatch (dispatch.cu) brings rows.
#pragma once

#include <cstdint>

#include "cuda/core/ptx.cuh"
#include "cuda/core/sync.cuh"
#include "cuda/node/await_cast.cuh"
#include "cuda/node/dispatch.h"
#include "plan/routing.h"

namespace jax_ep::cuda {

constexpr int kStages = 4;
constexpr int kMaxChunkBytes = 16 << 10;

// How a row is divided for the stages.
struct Chunks {
  int32_t bytes;  // of all but the last
  int32_t count;
};

__host__ __device__ inline Chunks ChunksOf(int32_t row_bytes) {
  if (row_bytes == 0) return {16, 0};  // only weights are brought
  const int32_t count = (row_bytes + kMaxChunkBytes - 1) / kMaxChunkBytes;
  const int32_t bytes = plan::RoundUp((row_bytes + count - 1) / count, 16);
  return {bytes, (row_bytes + bytes - 1) / bytes};
}

// Scales travel with the last chunk of their row if bulk copies can carry them.
__host__ __device__ inline int32_t BulkScaleBytes(const DispatchParams& p) {
  const int32_t bytes = p.scales_per_row * static_cast<int32_t>(sizeof(float));
  return bytes % 16 == 0 ? bytes : 0;
}

__host__ __device__ inline int32_t StageBytes(const DispatchParams& p) {
  return plan::RoundUp(ChunksOf(p.row_bytes).bytes, 128) + plan::RoundUp(BulkScaleBytes(p), 128);
}

// The stages of one mover.
struct Stages {
  char* memory;        // [kStages, bytes]
  uint64_t* barriers;  // [kStages]
  int32_t bytes;
  int32_t scale_bytes, scale_offset;  // of BulkScaleBytes, in a stage

  __device__ Stages(const DispatchParams& p, char* memory, uint64_t* barriers)
      : memory(memory),
        barriers(barriers),
        bytes(StageBytes(p)),
        scale_bytes(BulkScaleBytes(p)),
        scale_offset(bytes - plan::RoundUp(scale_bytes, 128)) {}

  __device__ char* At(int stage) const { return memory + stage * bytes; }

  // By all lanes, after this block has waited for inputs.
  __device__ void Begin() const {
    if (threadIdx.x % 32 == 0) {
      for (int s = 0; s < kStages; ++s) ptx::InitBarrier(&barriers[s], 1);
      ptx::FenceBarrierInit();
      ptx::FenceProxyAsyncGlobal();
    }
    __syncwarp();
  }

  // Starts to load `num_bytes` of a source's row, and with its end its scales. By one lane.
  template <bool kCast>
  __device__ __forceinline__ void Load(const DispatchParams& p, OpNumbers op, uint32_t* seen,
                                       const PeerInputs& inputs, int stage, int32_t source,
                                       int32_t offset, int32_t num_bytes) const {
    const int32_t rank = source / p.num_tokens;
    const int64_t token = source % p.num_tokens;
    if (kCast) WaitCast(p, op, seen, rank, static_cast<int32_t>(token));
    const bool with_scales = scale_bytes != 0 && offset + num_bytes == p.row_bytes;
    ptx::ArriveExpectBytes(&barriers[stage], num_bytes + (with_scales ? scale_bytes : 0));
    ptx::BulkLoad(At(stage), inputs.Of<char>(rank, 0) + token * p.row_bytes + offset, num_bytes,
                  &barriers[stage]);
    if (with_scales) {
      ptx::BulkLoad(At(stage) + scale_offset, inputs.Of<char>(rank, 1) + token * scale_bytes,
                    scale_bytes, &barriers[stage]);
    }
  }

  __device__ void Wait(int stage, uint32_t parity) const {
    while (!ptx::TryWaitParity(&barriers[stage], parity)) {
    }
  }
};

}  // namespace jax_ep::cuda
