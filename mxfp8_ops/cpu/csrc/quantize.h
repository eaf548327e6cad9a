// quantize: a block's scale from its largest magnitude, its elements rounded to nearest even and saturated at 448.
// Exponents come from bits. Plain loops: compilers vectorise them.
#pragma once

#include "problem.h"
#include "vector.h"

namespace {

constexpr uint32_t kInfinity = 0x7f800000;
constexpr uint32_t kMantissaOf1_75 = 0x600000;  // 448 = 1.75 * 2^8

// Rule 0 is "floor", 1 is "rceil"; for a block whose largest magnitude has these bits.
inline int scale_of(uint32_t largest, int rule) {
  if (largest >= kInfinity) return kScaleNan;
  int exponent = static_cast<int>(largest >> 23) - 8;
  if (rule == 1 && (largest & 0x7fffff) > kMantissaOf1_75) exponent++;
  return exponent < 0 ? 0 : exponent;
}

// The code of a value. Normal ones, 2^-6 and more, are rounded in their bits, which a carry leaves in order: from
// float32's bias to e4m3's are 120 in the exponent field. Below, adding 2^14 rounds to multiples of 2^-9.
inline uint32_t code_of(float value) {
  uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffff;
  magnitude = magnitude < 0x43e00000u ? magnitude : 0x43e00000u;  // 448
  uint32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120u << 3);
  uint32_t subnormal = to_bits(from_bits(magnitude) + 16384.0f) - to_bits(16384.0f);
  return (magnitude < 0x3c800000u ? subnormal : normal) | (bits >> 24 & 0x80);
}

template <class T>
inline void quantize_block(const T* x, uint8_t* codes, uint8_t* scale, int rule) {
  f32 values[kBlock];
  for (int i = 0; i < kVectors; i++) store(values + i * kWidth, load(x + i * kWidth));
  uint32_t largest = 0;
  for (int i = 0; i < kBlock; i++) {
    uint32_t magnitude = to_bits(values[i].value) & 0x7fffffff;  // magnitudes are ordered as their bits
    largest = magnitude > largest ? magnitude : largest;
  }
  int byte = scale_of(largest, rule);
  *scale = static_cast<uint8_t>(byte);
  if (byte == kScaleNan) {
    std::memset(codes, kElementNan, kBlock);
    return;
  }
  float inverse = power_of_two(127 - byte);
  for (int i = 0; i < kBlock; i++) codes[i] = static_cast<uint8_t>(code_of(values[i].value * inverse));
}

template <class T>
void quantize(const T* x, uint8_t* codes, uint8_t* scales, int64_t blocks, int rule, int threads) {
  in_portions(blocks, kBlock, threads_for(blocks * kBlock, threads), [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++)
      quantize_block(x + block * kBlock, codes + block * kBlock, scales + block, rule);
  });
}

}  // namespace
