// The gradients of a weighted row, by one warp: of the cotangent dy of its token and the row
// itself,
//
//   d_row = round(weight * dy)   and   d_weight = <row, dy>.
//
// The dot product has the fixed order of jax_ep.reference.combine_vjp: lane j of 256 adds the
// products of channels j, j + 256, ... and the lanes are added in a tree by halves. Thread t of a
// warp holds lanes 8 t to 8 t + 7.
#pragma once

#include <cstdint>

#include "cuda/rows/vectors.cuh"

namespace jax_ep::cuda {

__device__ __forceinline__ void Multiply(float (&x)[kVector], const float (&y)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = __fmul_rn(x[i], y[i]);
}

// The sum of 256 lanes, eight for each thread, by halves; valid in thread 0 of the warp.
__device__ inline float AddLanes(float (&lanes)[kVector]) {
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

// Sets all bits of row c of d_rows and d_weights to one value. Params has them as in
// node/combine_vjp.h. By one warp.
template <typename T, typename Params>
__device__ void FillGradients(const Params& p, int32_t c, uint32_t bits) {
  uint4* words = reinterpret_cast<uint4*>(static_cast<T*>(p.d_rows) + int64_t{c} * p.hidden);
  const int32_t words_per_row = p.hidden * sizeof(T) / 16;
  for (int32_t i = threadIdx.x % 32; i < words_per_row; i += 32) {
    words[i] = make_uint4(bits, bits, bits, bits);
  }
  if (threadIdx.x % 32 == 0) p.d_weights[c] = __uint_as_float(bits);
}

// The gradients of row c, which has no source: zeros, or that of its weight alone. By one warp.
template <typename T, typename Params>
__device__ void ClearGradients(const Params& p, int32_t c) {
  if (!p.keeps_unused) return FillGradients<T>(p, c, 0u);
  if (threadIdx.x % 32 == 0) p.d_weights[c] = 0.0f;
}

}  // namespace jax_ep::cuda
