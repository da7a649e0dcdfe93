// The arithmetic of float8_e4m3fn rows with one scale per 128 channels: that of jax_ep.quantize, to
// the bit. The threads that share a scale are kThreadsOfScale neighbours in a warp, which all take
// part, and each has a vector of channels.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "cuda/rows/vectors.cuh"

namespace jax_ep::cuda {

constexpr int kThreadsOfScale = 128 / kVector;

struct Float8Vector {
  uint2 values;
  float scale;
};

// The least power of two not below x (positive and normal); NaN stays NaN.
__device__ __forceinline__ float RoundUpToPowerOfTwo(float x) {
  if (isnan(x)) return x;
  return __uint_as_float((__float_as_uint(x) + 0x7FFFFFu) & 0x7F800000u);
}

// Like fminf(fmaxf(...)) with 448, but NaN stays NaN.
__device__ __forceinline__ float ClipToFloat8(float x) {
  constexpr float kMax = 448.0f;
  return x > kMax ? kMax : (x < -kMax ? -kMax : x);
}

__device__ __forceinline__ Float8Vector ToFloat8(const float (&channels)[kVector], bool ue8m0) {
  constexpr float kInverseMax = 1.0f / 448.0f;
  constexpr float kSmallestAmax = 1e-30f;
  // Compared as integers, magnitudes keep their order and NaN is above infinity.
  uint32_t amax_bits = 0;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    amax_bits = max(amax_bits, __float_as_uint(channels[j]) & 0x7FFFFFFFu);
  }
#pragma unroll
  for (int offset = kThreadsOfScale / 2; offset > 0; offset /= 2) {
    amax_bits = max(amax_bits, __shfl_xor_sync(~0u, amax_bits, offset));
  }
  const float amax = __uint_as_float(amax_bits);
  float scale = __fmul_rn(amax < kSmallestAmax ? kSmallestAmax : amax, kInverseMax);
  if (ue8m0) scale = RoundUpToPowerOfTwo(scale);
  const float inverse = __frcp_rn(scale);
  uint16_t pairs[kVector / 2];
#pragma unroll
  for (int j = 0; j < kVector; j += 2) {
    const float2 pair = make_float2(ClipToFloat8(__fmul_rn(channels[j], inverse)),
                                    ClipToFloat8(__fmul_rn(channels[j + 1], inverse)));
    pairs[j / 2] = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
  }
  return {make_uint2(pairs[0] | uint32_t{pairs[1]} << 16, pairs[2] | uint32_t{pairs[3]} << 16),
          scale};
}

// Four channels: those in a word of float8.
__device__ __forceinline__ void FromFloat8(uint32_t word, float scale, float* channels) {
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const __half2_raw pair =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(word >> (j * 8)), __NV_E4M3);
    const float2 both = __half22float2(__half2(pair));
    channels[j] = __fmul_rn(both.x, scale);
    channels[j + 1] = __fmul_rn(both.y, scale);
  }
}

__device__ __forceinline__ void FromFloat8(const Float8Vector& vector, float (&channels)[kVector]) {
  FromFloat8(vector.values.x, vector.scale, &channels[0]);
  FromFloat8(vector.values.y, vector.scale, &channels[4]);
}

}  // namespace jax_ep::cuda
