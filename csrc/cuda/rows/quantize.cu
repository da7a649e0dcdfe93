// float8_e4m3fn rows with one scale per 128 channels; the arithmetic of jax_ep.quantize, to the
// bit.

#include <algorithm>

#include "cuda/rows/float8.cuh"
#include "cuda/rows/quantize.h"
#include "cuda/rows/vectors.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) QuantizeKernel(QuantizeParams p) {
  const int64_t num_vectors = p.num_rows * p.hidden / kVector;
  const T* x = static_cast<const T*>(p.x);
  uint2* values = static_cast<uint2*>(p.values);
  // All threads of a warp go round together: num_vectors is a multiple of 16, not of 32.
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = first; i - threadIdx.x % 32 < num_vectors; i += step) {
    const bool inside = i < num_vectors;
    float channels[kVector] = {};
    if (inside) Unpack(LoadVector(x + i * kVector), channels);
    const Float8Vector quantized = ToFloat8(channels, p.ue8m0);
    if (!inside) continue;
    values[i] = quantized.values;
    if (i % kThreadsOfScale == 0) p.scales[i / kThreadsOfScale] = quantized.scale;
  }
}

// One warp does a row. The float8 channels are the last bytes of their row. So a vector of results
// overwrites only channels that it, or a vector before it, was made of.
template <typename T>
__global__ void __launch_bounds__(kThreads) DequantizeKernel(DequantizeParams p) {
  constexpr int kAtOnce = 4;  // vectors of a lane that are in flight together
  constexpr int kWarps = kThreads / 32;
  const int32_t lane = threadIdx.x % 32;
  const int32_t num_vectors = p.hidden / kVector;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; row < p.num_rows;
       row += int64_t{gridDim.x} * kWarps) {
    T* channels_out = static_cast<T*>(p.rows) + row * p.hidden;
    const uint2* values = reinterpret_cast<const uint2*>(
        reinterpret_cast<const char*>(channels_out) + (sizeof(T) - 1) * p.hidden);
    const float* scales = p.scales + row * (p.hidden / 128);
    for (int32_t v0 = lane; v0 - lane < num_vectors; v0 += 32 * kAtOnce) {
      uint2 packed[kAtOnce];
      float scale[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int32_t v = v0 + 32 * n;
        if (v >= num_vectors) continue;
        packed[n] = __ldcg(&values[v]);
        scale[n] = __ldcg(&scales[v / kThreadsOfScale]);
      }
      __syncwarp();  // all are read before any is overwritten
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int32_t v = v0 + 32 * n;
        if (v >= num_vectors) continue;
        float channels[kVector];
        FromFloat8({packed[n], scale[n]}, channels);
        StoreVector(channels_out + v * kVector, Pack<T>(channels));
      }
    }
  }
}

unsigned NumBlocks(int64_t num_rows, int32_t hidden) {
  const int64_t num_vectors = num_rows * hidden / kVector;
  return static_cast<unsigned>(
      std::clamp<int64_t>((num_vectors + kThreads - 1) / kThreads, 1, 132 * 8));
}

}  // namespace

cudaError_t LoadQuantize() {
  for (const RowType type : {RowType::kFloat32, RowType::kBFloat16, RowType::kFloat16}) {
    const cudaError_t error = VisitRowType(type, [](auto element) {
      cudaFuncAttributes attributes;
      const cudaError_t first =
          cudaFuncGetAttributes(&attributes, QuantizeKernel<decltype(element)>);
      if (first != cudaSuccess) return first;
      return cudaFuncGetAttributes(&attributes, DequantizeKernel<decltype(element)>);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchQuantize(const QuantizeParams& params, cudaStream_t stream) {
  return VisitRowType(params.type, [&](auto element) {
    QuantizeKernel<decltype(element)>
        <<<NumBlocks(params.num_rows, params.hidden), kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

cudaError_t LaunchDequantize(const DequantizeParams& params, cudaStream_t stream) {
  return VisitRowType(params.type, [&](auto element) {
    DequantizeKernel<decltype(element)>
        <<<NumBlocks(params.num_rows, params.hidden), kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace jax_ep::cuda
