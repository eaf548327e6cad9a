// One block of a weight as float32 vectors, with the values that dequantizing to a dtype gives.
#pragma once

#include "vector.h"

namespace {

// Whether decoding and one multiplication give the values: no NaN, exact in T, and a scale that is, together with what
// decode leaves out, a normal float32.
template <class T>
inline bool is_plain(const uint8_t* codes, uint8_t scale) {
  constexpr int kHighest = kHighestExact<T> < 254 - kDecodeExponent ? kHighestExact<T> : 254 - kDecodeExponent;
  return scale >= kLowestExact<T> && scale <= kHighest && !any_nan(codes);
}

// Any block, an element at a time: exact in float32, rounded to T, and back.
template <class T>
__attribute__((noinline, cold)) void exact_block(const uint8_t* codes, uint8_t scale, f32 out[kBlock]) {
  for (int i = 0; i < kBlock; i++) out[i].value = to_float(rounded<T>(element_value(codes[i]) * scale_value(scale)));
}

template <class T>
inline void dequant_block(const uint8_t* codes, uint8_t scale, vec out[kVectors]) {
  if (__builtin_expect(is_plain<T>(codes, scale), true)) {
    vec factor = set(from_bits(static_cast<uint32_t>(scale + kDecodeExponent) << 23));
    decode(codes, out);
    for (int i = 0; i < kVectors; i++) out[i] = mul(out[i], factor);
  } else {
    f32 values[kBlock];
    exact_block<T>(codes, scale, values);
    for (int i = 0; i < kVectors; i++) out[i] = load(values + i * kWidth);
  }
}

}  // namespace
