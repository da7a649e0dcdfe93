// Number formats of the rows, and conversions that round to nearest even and keep NaN.
//
// All of it is integer arithmetic, or float32 arithmetic that is exact or rounds once. It has no
// branches, so that loops over it vectorise, and it is right with denormals flushed (float_mode.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "ops/geometry.h"

namespace jax_ep::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float8E4M3FN {
  uint8_t bits;
};

inline uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float FloatOf(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float ToFloat(float value) { return value; }

inline float ToFloat(BFloat16 value) { return FloatOf(uint32_t{value.bits} << 16); }

inline float ToFloat(Float16 value) {
  constexpr uint32_t kExponentMask = 0x1fu << 23;
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t shifted = (value.bits & 0x7fffu) << 13;  // exponent and mantissa in place
  const uint32_t exponent = shifted & kExponentMask;
  const uint32_t normal = shifted + ((127u - 15u) << 23);
  const uint32_t special = normal + ((128u - 16u) << 23);  // infinity and NaN: exponent 255
  const float subnormal = static_cast<float>(value.bits & 0x3ffu) * 0x1p-24f;
  const uint32_t magnitude =
      exponent == kExponentMask ? special : (exponent == 0 ? BitsOf(subnormal) : normal);
  return FloatOf(sign | magnitude);
}

inline float ToFloat(Float8E4M3FN value) {
  const uint32_t sign = (value.bits & 0x80u) << 24;
  const uint32_t magnitude = value.bits & 0x7fu;
  const uint32_t normal = (magnitude << 20) + ((127u - 7u) << 23);
  const float subnormal = static_cast<float>(magnitude) * 0x1p-9f;
  const uint32_t bits =
      magnitude == 0x7fu ? 0x7fc00000u : (magnitude < 8u ? BitsOf(subnormal) : normal);
  return FloatOf(sign | bits);
}

template <typename T>
T FromFloat(float value);

template <>
inline float FromFloat<float>(float value) {
  return value;
}

template <>
inline BFloat16 FromFloat<BFloat16>(float value) {
  const uint32_t bits = BitsOf(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BFloat16{static_cast<uint16_t>(is_nan ? nan : rounded)};
}

template <>
inline Float16 FromFloat<Float16>(float value) {
  constexpr uint32_t kInfinity = 0x7c00u;
  constexpr uint32_t kFirstOverflow = 0x477ff000u;   // 65520: rounds to infinity
  constexpr uint32_t kSmallestNormal = 0x38800000u;  // 2^-14
  constexpr float kSubnormalMagic = 0.5f;            // its ulp is the smallest float16
  const uint32_t bits = BitsOf(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal =
      (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = BitsOf(FloatOf(magnitude) + kSubnormalMagic) - BitsOf(kSubnormalMagic);
  const uint32_t nan = kInfinity | 0x200u | ((magnitude >> 13) & 0x3ffu);
  const uint32_t finite = magnitude < kSmallestNormal ? subnormal : normal;
  const uint32_t overflowed = magnitude > 0x7f800000u ? nan : kInfinity;
  const uint32_t result = magnitude >= kFirstOverflow ? overflowed : finite;
  return Float16{static_cast<uint16_t>(((bits >> 16) & 0x8000u) | result)};
}

// `value` is NaN or within [-448, 448].
template <>
inline Float8E4M3FN FromFloat<Float8E4M3FN>(float value) {
  constexpr uint32_t kSmallestNormal = 0x3c800000u;  // 2^-6
  constexpr float kSubnormalMagic = 16384.0f;        // its ulp is the smallest float8_e4m3fn, 2^-9
  const uint32_t bits = BitsOf(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal =
      (magnitude - ((127u - 7u) << 23) + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
  const uint32_t subnormal = BitsOf(FloatOf(magnitude) + kSubnormalMagic) - BitsOf(kSubnormalMagic);
  const uint32_t finite = magnitude < kSmallestNormal ? subnormal : normal;
  const uint32_t result = magnitude > 0x7f800000u ? 0x7fu : finite;
  return Float8E4M3FN{static_cast<uint8_t>(((bits >> 24) & 0x80u) | result)};
}

// Calls `visit` with a value of the C++ type of `dtype`. That must not be kFloat8E4M3FN, because
// rows in that format are only moved.
template <typename Visitor>
auto VisitRowType(ops::DType dtype, Visitor&& visit) {
  switch (dtype) {
    case ops::DType::kBFloat16:
      return visit(BFloat16{});
    case ops::DType::kFloat16:
      return visit(Float16{});
    default:
      return visit(float{});
  }
}

}  // namespace jax_ep::cpu
