// Casts rows in the order of their tokens, in which ranks read them (rows/sources.cuh).

#include <algorithm>

#include "cuda/core/launch.cuh"
#include "cuda/core/sync.cuh"
#include "cuda/node/cast.h"
#include "cuda/rows/float8.cuh"
#include "cuda/rows/vectors.cuh"

namespace jax_ep::cuda {
namespace {

// So few that a block has room on an SM beside one of the dispatch.
constexpr int kThreads = 512;
constexpr int kAtOnce = 4;  // vectors of a thread that are in flight together

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) CastKernel(const __grid_constant__ CastParams c) {
  ptx::LetNextBegin();
  const QuantizeParams& p = c.rows;
  const GroupParams& group = c.group;
  // That of the dispatch.
  const uint64_t epoch = NumbersOfOp(group).epoch + (c.behind_plan ? 1 : 0);
  const int32_t num_tokens = static_cast<int32_t>(p.num_rows);
  const int32_t chunk_tokens = TokensOfChunk(num_tokens);
  __shared__ int32_t full_chunk;  // whose last piece this block has done, or -1
  for (int32_t first_token = blockIdx.x * kTokensOfPiece; first_token < num_tokens;
       first_token += gridDim.x * kTokensOfPiece) {
    const int64_t begin = int64_t{first_token} * p.hidden;
    const int32_t num_rows = plan::Min(kTokensOfPiece, num_tokens - first_token);
    const int32_t num_vectors = num_rows * (p.hidden / kVector);
    const T* x = static_cast<const T*>(p.x) + begin;
    uint2* values = reinterpret_cast<uint2*>(static_cast<char*>(p.values) + begin);
    float* scales = p.scales + begin / 128;
    // All threads of a warp go round together: there are multiples of 16 vectors, not of 32.
    for (int32_t first = threadIdx.x; first - static_cast<int32_t>(threadIdx.x % 32) < num_vectors;
         first += kThreads * kAtOnce) {
      float channels[kAtOnce][kVector] = {};
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int32_t i = first + n * kThreads;
        if (i < num_vectors) Unpack(LoadVector(x + int64_t{i} * kVector), channels[n]);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int32_t i = first + n * kThreads;
        const Float8Vector quantized = ToFloat8(channels[n], p.ue8m0);
        if (i >= num_vectors) continue;
        values[i] = quantized.values;
        if (i % kThreadsOfScale == 0) scales[i / kThreadsOfScale] = quantized.scale;
      }
    }
    // Long enough for the plan to end meanwhile.
    for (uint32_t i = 0; i < (kMutation == kWithoutCast ? 80 : 1); ++i) {
      TestDelay(group.rank, epoch, 50 + i);
    }
    __syncthreads();
    const int32_t chunk = first_token / chunk_tokens;
    if (threadIdx.x == 0) {
      const int32_t tokens = plan::Min(chunk_tokens, num_tokens - chunk * chunk_tokens);
      const uint32_t pieces = (tokens + kTokensOfPiece - 1) / kTokensOfPiece;
      __threadfence();
      const bool is_full = atomicAdd(&Own(group).cast_pieces[chunk], 1u) == pieces - 1;
      if (is_full) {
        Own(group).cast_pieces[chunk] = 0;
        __threadfence();
      }
      full_chunk = is_full ? chunk : -1;
    }
    __syncthreads();
    if (full_chunk >= 0 && threadIdx.x < group.num_ranks) {
      ptx::FenceAcquireReleaseSystem();  // of the pieces of other blocks too, by the count
      ptx::StoreRelaxedSystem(&group.peers[threadIdx.x]->ring_ready[group.rank][chunk],
                              RingWord(chunk, epoch));
    }
  }
  // One block is enough for the end of this kernel to be that of the plan too. The others leave
  // their SMs.
  if (blockIdx.x == 0) ptx::WaitForPrevious();
}

}  // namespace

cudaError_t LoadCast() {
  for (const RowType type : {RowType::kFloat32, RowType::kBFloat16, RowType::kFloat16}) {
    // Otherwise no block of the dispatch, which takes most of the shared memory of an SM, could
    // begin beside one of these: an SM that is at work does not change what it uses as cache.
    const cudaError_t error = VisitRowType(type, [](auto element) {
      return cudaFuncSetAttribute(CastKernel<decltype(element)>,
                                  cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchCast(const CastParams& params, cudaStream_t stream) {
  return VisitRowType(params.rows.type, [&](auto element) {
    if (params.behind_plan) {
      return LaunchBehind(&CastKernel<decltype(element)>, params.num_blocks, kThreads, 0, stream,
                          params);
    }
    CastKernel<decltype(element)><<<params.num_blocks, kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace jax_ep::cuda
