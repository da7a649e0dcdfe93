// Rows as vectors of eight channels: loads, stores and the conversions to and from float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/row_type.h"

namespace jax_ep::cuda {

// Channels that one thread handles at a time.
constexpr int kVector = 8;

// Eight channels as they lie in memory: 16 bytes of 16-bit floats, or 32 bytes of float32.
template <typename T>
struct RawVector {
  uint4 words[sizeof(T) * kVector / 16];
};

// Past the L1 cache, which is not coherent between GPUs.
template <typename T>
__device__ __forceinline__ RawVector<T> LoadVector(const T* channels) {
  RawVector<T> raw;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(raw.words) / 16); ++i) {
    raw.words[i] = __ldcg(reinterpret_cast<const uint4*>(channels) + i);
  }
  return raw;
}

template <typename T>
__device__ __forceinline__ void StoreVector(T* channels, const RawVector<T>& raw) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(raw.words) / 16); ++i) {
    reinterpret_cast<uint4*>(channels)[i] = raw.words[i];
  }
}

// As far as `bytes` go, a multiple of 16: a row of float32 may end in half a vector.
template <typename T>
__device__ __forceinline__ void StorePart(T* channels, const RawVector<T>& raw, int32_t bytes) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(raw.words) / 16); ++i) {
    if (16 * i < bytes) reinterpret_cast<uint4*>(channels)[i] = raw.words[i];
  }
}

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float ToFloat(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T FromFloat(float x);
template <>
__device__ __forceinline__ float FromFloat<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 FromFloat<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half FromFloat<__half>(float x) {
  return __float2half_rn(x);
}

template <typename T>
__device__ __forceinline__ void Unpack(const RawVector<T>& raw, float (&channels)[kVector]) {
  const T* values = reinterpret_cast<const T*>(&raw);
#pragma unroll
  for (int i = 0; i < kVector; ++i) channels[i] = ToFloat(values[i]);
}

template <typename T>
__device__ __forceinline__ RawVector<T> Pack(const float (&channels)[kVector]) {
  RawVector<T> raw;
  T* values = reinterpret_cast<T*>(&raw);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = FromFloat<T>(channels[i]);
  return raw;
}

// Calls `visit` with a value of the C++ type of `type`.
template <typename Visitor>
inline cudaError_t VisitRowType(RowType type, Visitor&& visit) {
  switch (type) {
    case RowType::kBFloat16:
      return visit(__nv_bfloat16{});
    case RowType::kFloat16:
      return visit(__half{});
    default:
      return visit(float{});
  }
}

}  // namespace jax_ep::cuda
