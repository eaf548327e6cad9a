// The MX format in bits, one value at a time: what the vector code of this folder must agree with.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int kBlock = 32;       // elements that share one scale byte
constexpr int kScaleNan = 255;   // E8M0: NaN for the whole block
constexpr int kElementMost = 0x7e;  // 448
constexpr int kElementNan = 0x7f;

// The dtypes of activations and results. Packed: tensors may start at any byte.
struct __attribute__((packed)) f32 {
  float value;
};
struct __attribute__((packed)) bf16 {
  uint16_t bits;
};
struct __attribute__((packed)) f16 {
  uint16_t bits;
};

// Memory as vectors of a type; vectors may be unaligned where the instruction takes them so.
template <class V>
V* as(void* memory) {
  return static_cast<V*>(memory);
}
template <class V>
const V* as(const void* memory) {
  return static_cast<const V*>(memory);
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// 2^exponent, exponent in [-126, 127].
inline float power_of_two(int exponent) { return from_bits(static_cast<uint32_t>(exponent + 127) << 23); }

// An element's value. Exponent and mantissa moved to where float32 has them mean 2^-120 times the value, subnormals
// included, because e4m3's exponent has bias 7 and float32's 127.
inline float element_value(uint8_t code) {
  if ((code & 0x7f) == kElementNan) return std::numeric_limits<float>::quiet_NaN();
  float magnitude = from_bits(static_cast<uint32_t>(code & 0x7f) << 20) * power_of_two(120);
  return code & 0x80 ? -magnitude : magnitude;
}

// 2^(scale - 127). Byte 0 is a float32 subnormal, which the exponent field alone cannot say.
inline float scale_value(uint8_t scale) {
  if (scale == kScaleNan) return std::numeric_limits<float>::quiet_NaN();
  return from_bits(scale == 0 ? 0x00400000u : static_cast<uint32_t>(scale) << 23);
}

// The code of a value, to nearest even, saturated. Normal ones, 2^-6 and more, are rounded in their bits, which a carry
// leaves in order: from float32's bias to e4m3's are 120 in the exponent field. Below, adding 2^14 rounds to multiples of
// 2^-9.
inline uint8_t code_of(float value) {
  uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffff;
  magnitude = magnitude < 0x43e00000u ? magnitude : 0x43e00000u;  // 448
  uint32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120u << 3);
  uint32_t subnormal = to_bits(from_bits(magnitude) + 16384.0f) - to_bits(16384.0f);
  uint32_t is_normal = magnitude < 0x3c800000u ? 0 : ~0u;  // no branch: compilers do not vectorise one around an addition
  return static_cast<uint8_t>((normal & is_normal) | (subnormal & ~is_normal) | (bits >> 24 & 0x80));
}

inline float to_float(f32 x) { return x.value; }
inline float to_float(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

// float16's fields moved to where float32 has them mean 2^-112 times the value; infinity and NaN need the full exponent.
inline float to_float(f16 x) {
  uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float value = magnitude >= 0x0f800000u ? from_bits(magnitude | 0x7f800000u) : from_bits(magnitude) * power_of_two(112);
  return x.bits & 0x8000 ? -value : value;
}

template <class T>
T rounded(float value);  // to nearest even, overflow to infinity

template <>
inline f32 rounded<f32>(float value) {
  return {value};
}

template <>
inline bf16 rounded<bf16>(float value) {
  uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40)};  // a NaN stays one
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline f16 rounded<f16>(float value) {
  uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffffu;
  uint32_t short_bits;
  if (bits > 0x7f800000u) {
    short_bits = 0x7e00;
  } else if (bits >= 0x477ff000u) {  // 65520 and more
    short_bits = 0x7c00;
  } else if (bits < 0x38800000u) {  // below 2^-14: one unit of 0.5 in float32 is one of float16's subnormals
    short_bits = to_bits(from_bits(bits) + 0.5f) - to_bits(0.5f);
  } else {
    short_bits = (bits - 0x38000000u + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | short_bits)};
}

// Scale bytes under which every element is exact in a dtype.
template <class T>
constexpr int kLowestExact = 0;
template <>
constexpr int kLowestExact<bf16> = 3;
template <>
constexpr int kLowestExact<f16> = 112;
template <class T>
constexpr int kHighestExact = 246;
template <>
constexpr int kHighestExact<f16> = 134;

}  // namespace
