// quantize: a block's scale from its largest magnitude, its elements rounded to nearest even and saturated at 448.
// Exponents come from bits.
#pragma once

#include "problem.h"
#include "shorts.h"
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

constexpr int kHighestEncoded = 245;  // beyond, encode's factor would not be a normal number

#if MXFP8_LEVEL >= 1
// Most blocks. False where another way must be taken.
inline bool quantize_quickly(const bf16* x, uint8_t* codes, uint8_t* scale, int rule) {
  int byte = scale_of(largest_bits(x), rule);
  *scale = static_cast<uint8_t>(byte);
  return byte >= kLeastShort && byte <= kMostShort && encode_normal(x, byte, codes);
}
#endif
template <class T>
inline bool quantize_quickly(const T*, uint8_t*, uint8_t*, int) {
  return false;
}

template <class T>
inline void quantize_block(const T* x, uint8_t* codes, uint8_t* scale, int rule) {
  if (quantize_quickly(x, codes, scale, rule)) return;
  vec values[kVectors];
  for (int i = 0; i < kVectors; i++) values[i] = load(x + i * kWidth);
  int byte = scale_of(largest_bits(values), rule);
  *scale = static_cast<uint8_t>(byte);
  if (__builtin_expect(byte <= kHighestEncoded, true)) {
    encode(values, power_of_two(127 - byte - kEncodeExponent), codes);
  } else if (byte == kScaleNan) {
    std::memset(codes, kElementNan, kBlock);
  } else {
    for (int i = 0; i < kBlock; i++) codes[i] = code_of(to_float(x[i]) * power_of_two(127 - byte));
  }
}

template <class T>
void quantize(const T* x, uint8_t* codes, uint8_t* scales, int64_t blocks, int rule, int threads) {
  in_portions(blocks, kBlock, threads_for(blocks * kBlock, threads), kAnyTile, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++)
      quantize_block(x + block * kBlock, codes + block * kBlock, scales + block, rule);
  });
}

}  // namespace
