// Block quantization of rows to float8_e4m3fn, bit for bit as jax_ep.quantize does it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/numerics.h"
#include "ops/dispatch.h"

namespace jax_ep::cpu {

constexpr float kFp8Max = 448.0f;

// The scale of one block of 128 channels. NaN in the block gives a NaN scale.
template <typename T>
float BlockScale(const T* x /*[128]*/, ops::Quantization quantization) {
  constexpr float kSmallestAmax = 1e-30f;
  constexpr float kInverseFp8Max = static_cast<float>(1.0 / 448.0);
  // Bit patterns of non-negative floats are ordered like the floats, with NaN above all of them.
  uint32_t amax_bits = BitsOf(kSmallestAmax);
  for (int32_t h = 0; h < ops::kScaleBlock; ++h) {
    amax_bits = std::max(amax_bits, BitsOf(ToFloat(x[h])) & 0x7fffffffu);
  }
  const float scale = FloatOf(amax_bits) * kInverseFp8Max;
  if (quantization != ops::Quantization::kFp8Ue8m0 || scale != scale) return scale;
  return FloatOf((BitsOf(scale) + 0x7fffffu) & 0x7f800000u);
}

inline Float8E4M3FN QuantizeValue(float x, float inverse_scale) {
  float scaled = x * inverse_scale;
  scaled = scaled > kFp8Max ? kFp8Max : scaled;
  scaled = scaled < -kFp8Max ? -kFp8Max : scaled;
  return FromFloat<Float8E4M3FN>(scaled);
}

// values [H] and scales [H / 128] of a row x [H].
template <typename T>
void QuantizeRow(const T* x, int32_t hidden, ops::Quantization quantization, Float8E4M3FN* values,
                 float* scales) {
  for (int32_t begin = 0; begin < hidden; begin += ops::kScaleBlock) {
    const float scale = BlockScale(x + begin, quantization);
    const float inverse = 1.0f / scale;
    for (int32_t h = begin; h < begin + ops::kScaleBlock; ++h) {
      values[h] = QuantizeValue(ToFloat(x[h]), inverse);
    }
    scales[begin / ops::kScaleBlock] = scale;
  }
}

// The row x [H] after quantization and dequantization.
template <typename T>
void RoundTripRow(const T* x, int32_t hidden, ops::Quantization quantization, T* rows) {
  for (int32_t begin = 0; begin < hidden; begin += ops::kScaleBlock) {
    const float scale = BlockScale(x + begin, quantization);
    const float inverse = 1.0f / scale;
    for (int32_t h = begin; h < begin + ops::kScaleBlock; ++h) {
      rows[h] = FromFloat<T>(ToFloat(QuantizeValue(ToFloat(x[h]), inverse)) * scale);
    }
  }
}

}  // namespace jax_ep::cpu
