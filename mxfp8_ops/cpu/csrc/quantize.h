// quantize: a block's scale from its largest magnitude, its elements rounded to nearest even and saturated at 448.
// Exponents come from bits.
#pragma once

#include "problem.h"
#include "shorts.h"
#include "vector.h"

namespace {

constexpr uint32_t kInfinity = 0x7f800000;
constexpr uint32_t kMantissaOf1_75 = 0x600000;  // 448 = 1.75 * 2^8

// Rule 0 is "floor", 1 is "rceil"; for a block whose largest magnitude has these bits. Without branches: none of them would
// be foreseen.
inline int scale_of(uint32_t largest, int rule) {
  int exponent = static_cast<int>(largest >> 23) - 8;
  exponent += (largest & 0x7fffff) > (rule == 1 ? kMantissaOf1_75 : 0x7fffff);
  exponent = exponent < 0 ? 0 : exponent;
  return largest >= kInfinity ? kScaleNan : exponent;
}

constexpr int kHighestEncoded = 245;  // beyond, encode's factor would not be a normal number

// Any block.
template <class T>
__attribute__((noinline)) void encode_block(const T* x, int byte, uint8_t* codes) {
  if (byte <= kHighestEncoded) {
    vec values[kVectors];
    for (int i = 0; i < kVectors; i++) values[i] = load(x + i * kWidth);
    encode(values, power_of_two(127 - byte - kEncodeExponent), codes);
  } else if (byte == kScaleNan) {
    std::memset(codes, kElementNan, kBlock);
  } else {
    for (int i = 0; i < kBlock; i++) codes[i] = code_of(to_float(x[i]) * power_of_two(127 - byte));
  }
}

template <class T>
inline uint32_t largest_bits(const T* x) {
  vec values[kVectors];
  for (int i = 0; i < kVectors; i++) values[i] = load(x + i * kWidth);
  return largest_bits(values);
}

template <class T>
inline bool encode_quickly(const T*, int, uint8_t*) {
  return false;
}
#if MXFP8_LEVEL >= 1
inline bool encode_quickly(const bf16* x, int byte, uint8_t* codes) {
  return byte >= kLeastShort && byte <= kMostShort && encode_normal(x, byte, codes);
}
#endif

constexpr int kAtOnce = 32;                // blocks: one does not wait for the scale of the one before
constexpr int64_t kStreamCodes = 8 << 20;  // codes beyond so many are written past the caches

// Up to kAtOnce blocks: all scales, then all codes. While these are encoded, memory is asked for the ones after the next.
template <class T>
inline void quantize_blocks(const T* x, uint8_t* codes, uint8_t* scales, int64_t count, int rule) {
  uint32_t largest[kAtOnce] = {};
  int bytes[kAtOnce];
  for (int64_t i = 0; i < count; i++) largest[i] = largest_bits(x + i * kBlock);
  for (int i = 0; i < kAtOnce; i++) bytes[i] = scale_of(largest[i], rule);
  for (int64_t i = 0; i < count; i++) scales[i] = static_cast<uint8_t>(bytes[i]);
  for (int64_t i = 0; i < count; i++) {
    const T* from = x + i * kBlock;
    const uintptr_t ahead = reinterpret_cast<uintptr_t>(from) + 2 * kAtOnce * kBlock * sizeof(T);
    for (size_t line = 0; line < kBlock * sizeof(T); line += 64) __builtin_prefetch(reinterpret_cast<const void*>(ahead + line));
    if (!encode_quickly(from, bytes[i], codes + i * kBlock)) encode_block(from, bytes[i], codes + i * kBlock);
  }
}

template <class T>
void quantize(const T* x, uint8_t* codes, uint8_t* scales, int64_t blocks, int rule, int threads) {
  const int64_t groups = (blocks + kAtOnce - 1) / kAtOnce;
  const bool streams = blocks * kBlock >= kStreamCodes && reinterpret_cast<uintptr_t>(codes) % 64 == 0;
  in_portions(groups, kAtOnce * kBlock, threads_for(blocks * kBlock, threads), 1, [=](int64_t group, int64_t last) {
    alignas(64) uint8_t some[kAtOnce * kBlock];
    for (; group < last; group++) {
      const int64_t block = group * kAtOnce, count = blocks - block < kAtOnce ? blocks - block : kAtOnce;
      const bool past = streams && count == kAtOnce;
      uint8_t* to = codes + block * kBlock;
      quantize_blocks(x + block * kBlock, past ? some : to, scales + block, count, rule);
      for (int i = 0; past && i < kAtOnce * kBlock; i += kWidth * 4) stream(as<f32>(to + i), load(as<f32>(some + i)));
    }
    if (streams) fence();
  });
}

}  // namespace
