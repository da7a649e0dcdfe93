// Rows as vectors of eight channels: loads, stores and the conversions to and from float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/rows/row_type.h"

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

// Stores only `bytes`, a multiple of 16, because a row of float32 may end in half a vector.
template <typename T>
__device__ __forceinline__ void StorePart(T* channels, const RawVector<T>& raw, int32_t bytes) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(raw.words) / 16); ++i) {
    if (16 * i < bytes) reinterpret_cast<uint4*>(channels)[i] = raw.words[i];
  }
}

// The 32-bit word of a vector that holds channel `i`.
template <typename T>
__device__ __forceinline__ uint32_t& WordOf(RawVector<T>& raw, int i) {
  return reinterpret_cast<uint32_t*>(&raw)[i * sizeof(T) / 4];
}

// The channels in a word: two, or one of float32. Whole words, because compilers turn conversions
// of single 16-bit floats into twice as many instructions, at a quarter of the speed.
__device__ __forceinline__ void UnpackWord(float, uint32_t word, float* channels) {
  channels[0] = __uint_as_float(word);
}
__device__ __forceinline__ void UnpackWord(__nv_bfloat16, uint32_t word, float* channels) {
  channels[0] = __uint_as_float(word << 16);
  channels[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void UnpackWord(__half, uint32_t word, float* channels) {
  const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
  channels[0] = both.x;
  channels[1] = both.y;
}

// The inverse, rounded to nearest, ties to even.
__device__ __forceinline__ uint32_t PackWord(float, const float* channels) {
  return __float_as_uint(channels[0]);
}
__device__ __forceinline__ uint32_t PackWord(__nv_bfloat16, const float* channels) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(channels[0], channels[1]);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ uint32_t PackWord(__half, const float* channels) {
  const __half2 both = __floats2half2_rn(channels[0], channels[1]);
  return *reinterpret_cast<const uint32_t*>(&both);
}

template <typename T>
__device__ __forceinline__ void Unpack(RawVector<T> raw, float (&channels)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; i += 4 / sizeof(T)) UnpackWord(T{}, WordOf(raw, i), &channels[i]);
}

template <typename T>
__device__ __forceinline__ RawVector<T> Pack(const float (&channels)[kVector]) {
  RawVector<T> raw;
#pragma unroll
  for (int i = 0; i < kVector; i += 4 / sizeof(T)) WordOf(raw, i) = PackWord(T{}, &channels[i]);
  return raw;
}

// Channels in 16 bytes.
template <typename T>
constexpr int kWordsChannels = 16 / sizeof(T);

template <typename T>
__device__ __forceinline__ void Unpack(uint4 raw, float (&channels)[kWordsChannels<T>]) {
  constexpr int kPerWord = 4 / sizeof(T);
  UnpackWord(T{}, raw.x, &channels[0]);
  UnpackWord(T{}, raw.y, &channels[kPerWord]);
  UnpackWord(T{}, raw.z, &channels[2 * kPerWord]);
  UnpackWord(T{}, raw.w, &channels[3 * kPerWord]);
}

template <typename T>
__device__ __forceinline__ uint4 Pack16(const float (&channels)[kWordsChannels<T>]) {
  constexpr int kPerWord = 4 / sizeof(T);
  return make_uint4(PackWord(T{}, &channels[0]), PackWord(T{}, &channels[kPerWord]),
                    PackWord(T{}, &channels[2 * kPerWord]), PackWord(T{}, &channels[3 * kPerWord]));
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
