// Rows of float8 that become dense on their way, from one stage in shared memory to another.
#pragma once

#include <cstdint>

#include "cuda/rows/float8.cuh"
#include "cuda/rows/row_type.h"
#include "cuda/rows/vectors.cuh"
#include "ops/dispatch.h"
#include "plan/routing.h"

namespace jax_ep::cuda {

// The scales of a chunk of a row. Bulk copies take 16 bytes or more at addresses that are multiples
// of 16, so up to three scales before these are copied too, and up to three behind them.
struct ScaleSlice {
  int64_t first;       // the scale of all rows with which the copy begins
  int32_t num_before;  // those that are copied before the chunk's own
  int32_t bytes;

  // Of up to `chunk` channels of row `row`, of which `channel` is the first one.
  __device__ ScaleSlice(int64_t row, int32_t hidden, int32_t channel, int32_t chunk) {
    const int64_t begin = (row * hidden + channel) / ops::kScaleBlock;
    const int32_t count = plan::Min(chunk, hidden - channel) / ops::kScaleBlock;
    num_before = static_cast<int32_t>(begin % kUnit);
    first = begin - num_before;
    bytes = plan::RoundUp(num_before + count, kUnit) * static_cast<int32_t>(sizeof(float));
  }

  // For so many channels.
  __host__ __device__ static int32_t MaxBytes(int32_t chunk) {
    const int32_t count = (chunk + ops::kScaleBlock - 1) / ops::kScaleBlock;
    return plan::RoundUp(count + kUnit - 1, kUnit) * static_cast<int32_t>(sizeof(float));
  }

 private:
  static constexpr int32_t kUnit = 4;
};

// A lane's vectors v, v + 32, ... of 16 bytes as results; kAtOnce of them.
template <typename T, int kAtOnce>
__device__ __forceinline__ void ToDenseVectors(const char* values, const float* scales, int32_t v,
                                               char* dense) {
  constexpr int kChannels = kWordsChannels<T>;
  constexpr int kVectorsOfScale = ops::kScaleBlock / kChannels;
  struct alignas(kChannels) Vector {
    uint32_t words[kChannels / 4];
  };
  const Vector* from = reinterpret_cast<const Vector*>(values) + v;
  scales += v / kVectorsOfScale;
  uint4* to = reinterpret_cast<uint4*>(dense) + v;
  Vector vectors[kAtOnce];
  float scale[kAtOnce];
#pragma unroll
  for (int n = 0; n < kAtOnce; ++n) {
    vectors[n] = from[32 * n];
    scale[n] = scales[32 * n / kVectorsOfScale];
  }
#pragma unroll
  for (int n = 0; n < kAtOnce; ++n) {
    float channels[kChannels];
#pragma unroll
    for (int j = 0; j < kChannels; j += 4) {
      FromFloat8(vectors[n].words[j / 4], scale[n], &channels[j]);
    }
    to[32 * n] = Pack16<T>(channels);
  }
}

// The lanes of a warp take neighbouring vectors, so neither loads nor stores have bank conflicts.
template <typename T>
__device__ __forceinline__ void ToDense(const char* values, const float* scales,
                                        int32_t num_channels, char* dense) {
  const int32_t num_vectors = num_channels / kWordsChannels<T>;
  int32_t v = threadIdx.x % 32;
  for (; v + 3 * 32 < num_vectors; v += 4 * 32) ToDenseVectors<T, 4>(values, scales, v, dense);
  if (v + 32 < num_vectors) {
    ToDenseVectors<T, 2>(values, scales, v, dense);
    v += 2 * 32;
  }
  if (v < num_vectors) ToDenseVectors<T, 1>(values, scales, v, dense);
}

// The channels in `values`, with one of `scales` for each ops::kScaleBlock of them, in dtype
// `type`; the arithmetic of jax_ep.dequantize, to the bit. All in shared memory, aligned to 16. By
// all lanes of a warp.
__device__ __forceinline__ void ToDense(RowType type, const char* values, const float* scales,
                                        int32_t num_channels, char* dense) {
  switch (type) {
    case RowType::kBFloat16:
      return ToDense<__nv_bfloat16>(values, scales, num_channels, dense);
    case RowType::kFloat16:
      return ToDense<__half>(values, scales, num_channels, dense);
    default:
      return ToDense<float>(values, scales, num_channels, dense);
  }
}

}  // namespace jax_ep::cuda
