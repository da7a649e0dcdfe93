// Gradients of combine with fused weights: every rank reads the cotangents of the tokens whose rows
// it has, each once over the link, and makes of each row's cotangent and the row itself
//
//   d_row = round(weight * dy)   and   d_weight = <row, dy>.
//
// The dot product has the fixed order of jax_ep.reference.combine_vjp: lane j of 256 adds the
// products of channels j, j + 256, ... and the lanes are added in a tree by halves. Thread t of a
// warp holds lanes 8 t to 8 t + 7.

#include <algorithm>

#include "cuda/combine_vjp.h"
#include "cuda/sync.cuh"
#include "cuda/vectors.cuh"
#include "plan/routing.h"

namespace jax_ep::cuda {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kSharedBytes = 200 << 10;

// Warps of a block: each stages one row in shared memory.
int NumWarps(const CombineVjpParams& p) {
  const int64_t row_bytes = int64_t{p.hidden} * ByteWidth(p.type);
  return static_cast<int>(std::clamp<int64_t>(kSharedBytes / row_bytes, 1, kMaxWarps));
}

__device__ __forceinline__ void Multiply(float (&x)[kVector], const float (&y)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = __fmul_rn(x[i], y[i]);
}

// The sum of 256 lanes, eight a thread, by halves; valid in thread 0 of the warp.
__device__ float AddLanes(float (&lanes)[kVector]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      lanes[i] = __fadd_rn(lanes[i], __shfl_down_sync(~0u, lanes[i], offset));
    }
  }
#pragma unroll
  for (int half = kVector / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) lanes[i] = __fadd_rn(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

// One source, by one warp.
template <typename T>
__device__ void Differentiate(const CombineVjpParams& p, const PeerInputs& inputs, int32_t source,
                              T* staged) {
  const int32_t lane = threadIdx.x % 32;
  const int32_t num_vectors = p.hidden / kVector;
  const int32_t* source_rows = p.recv_rows + int64_t{source} * p.num_rows;
  if (source_rows[0] < 0) return;
  const T* dy = inputs.Of<T>(source / p.num_tokens, 0) + int64_t{source % p.num_tokens} * p.hidden;
#pragma unroll 4
  for (int32_t v = lane; v < num_vectors; v += 32) {
    StoreVector(staged + v * kVector, LoadVector(dy + v * kVector));
  }
  __syncwarp();
  for (int32_t m = 0; m < p.num_rows; ++m) {
    const int32_t row = source_rows[m];
    if (row < 0 || row >= p.capacity) break;
    const float weight = p.row_weights[row];
    const T* given = static_cast<const T*>(p.rows) + int64_t{row} * p.hidden;
    T* d_row = static_cast<T*>(p.d_rows) + int64_t{row} * p.hidden;
    float lanes[kVector] = {};
#pragma unroll 4
    for (int32_t v = lane; v < num_vectors; v += 32) {
      float gradient[kVector], products[kVector], scaled[kVector];
      Unpack(*reinterpret_cast<const RawVector<T>*>(staged + v * kVector), gradient);
      Unpack(LoadVector(given + v * kVector), products);
      Multiply(products, gradient);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        lanes[i] = __fadd_rn(lanes[i], products[i]);
        scaled[i] = __fmul_rn(gradient[i], weight);
      }
      StoreVector(d_row + v * kVector, Pack<T>(scaled));
    }
    const float d_weight = AddLanes(lanes);
    if (lane == 0) p.d_weights[row] = d_weight;
  }
  __syncwarp();
}

// Zeros for the rows that have no source, or NaN for all rows.
template <typename T>
__device__ void Fill(const CombineVjpParams& p, bool failed) {
  const int32_t num_warps = blockDim.x / 32;
  const int32_t lane = threadIdx.x % 32;
  const uint32_t word = failed ? ~0u : 0u;
  const int32_t words_per_row = p.hidden * sizeof(T) / 16;
  for (int32_t c = blockIdx.x * num_warps + threadIdx.x / 32; c < p.capacity;
       c += gridDim.x * num_warps) {
    if (!failed && p.recv_src[c] >= 0) continue;
    uint4* words = reinterpret_cast<uint4*>(static_cast<T*>(p.d_rows) + int64_t{c} * p.hidden);
    for (int32_t i = lane; i < words_per_row; i += 32)
      words[i] = make_uint4(word, word, word, word);
    if (lane == 0) p.d_weights[c] = __uint_as_float(word);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxWarps * 32)
    CombineVjpKernel(const __grid_constant__ CombineVjpParams p) {
  extern __shared__ __align__(16) char memory[];
  const uint64_t epoch = BeginOp(p.group);
  if (blockIdx.x == 0) Publish(p.group, epoch, {p.dy, nullptr, nullptr});
  __shared__ PeerInputs inputs;
  const bool ok = WaitInputs(p.group, epoch, inputs);
  if (ok) {
    const int32_t num_warps = blockDim.x / 32;
    T* staged = reinterpret_cast<T*>(memory) + int64_t{threadIdx.x / 32} * p.hidden;
    const int32_t num_sources = p.group.num_ranks * p.num_tokens;
    for (int32_t i = blockIdx.x * num_warps + threadIdx.x / 32; i < num_sources;
         i += gridDim.x * num_warps) {
      // Sources alternate between ranks, as in dispatch.
      const int32_t rank = (p.group.rank + 1 + i % p.group.num_ranks) % p.group.num_ranks;
      Differentiate<T>(p, inputs, rank * p.num_tokens + i / p.group.num_ranks, staged);
    }
  }
  Fill<T>(p, !ok);
  EndOp(p.group, epoch);
}

}  // namespace

cudaError_t LoadCombineVjp() {
  for (const RowType type : {RowType::kFloat32, RowType::kBFloat16, RowType::kFloat16}) {
    const cudaError_t error = VisitRowType(type, [](auto element) {
      return cudaFuncSetAttribute(CombineVjpKernel<decltype(element)>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchCombineVjp(const CombineVjpParams& params, cudaStream_t stream) {
  const int num_warps = NumWarps(params);
  const size_t shared_bytes =
      static_cast<size_t>(params.hidden) * ByteWidth(params.type) * num_warps;
  if (shared_bytes > kSharedBytes) return cudaErrorInvalidValue;
  return VisitRowType(params.type, [&](auto element) {
    CombineVjpKernel<decltype(element)>
        <<<params.num_blocks, num_warps * 32, shared_bytes, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace jax_ep::cuda
