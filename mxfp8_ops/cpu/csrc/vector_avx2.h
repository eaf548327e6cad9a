// Level "avx2": 8 floats a vector.
#pragma once

#include <immintrin.h>

#include "format.h"

namespace {

using vec = __m256;
constexpr int kWidth = 8;
constexpr int kDecodeExponent = 8;
constexpr int kEncodeExponent = 8;

inline vec zero() { return _mm256_setzero_ps(); }
inline vec set(float value) { return _mm256_set1_ps(value); }
inline vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
inline vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(vec a) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline __m128i load_half(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
inline vec load(const f32* from) { return _mm256_loadu_ps(as<float>(from)); }
inline vec load(const bf16* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(from)), 16));
}
inline vec load(const f16* from) { return _mm256_cvtph_ps(load_half(from)); }

inline __m128i to_bf16(vec a) {
  __m256i bits = _mm256_castps_si256(a);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  nearest = _mm256_blendv_epi8(nearest, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
  nearest = _mm256_srli_epi32(nearest, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(nearest), _mm256_extracti128_si256(nearest, 1));
}

inline void store(f32* to, vec a) { _mm256_storeu_ps(as<float>(to), a); }
inline void store(bf16* to, vec a) { _mm_storeu_si128(as<__m128i>(to), to_bf16(a)); }
inline void store(f16* to, vec a) {
  __m128i half = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(as<__m128i>(to), half);
}

// The same past the caches: `to` is aligned. fence() makes what was streamed visible to other threads.
inline void stream(f32* to, vec a) { _mm256_stream_ps(as<float>(to), a); }
inline void stream(bf16* to, vec a) { _mm_stream_si128(as<__m128i>(to), to_bf16(a)); }
inline void stream(f16* to, vec a) {
  __m128i half = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_stream_si128(as<__m128i>(to), half);
}
inline void fence() { _mm_sfence(); }

// e4m3 to float16: the sign extended word shifted left by 7 has sign, sign, exponent, mantissa; without the second
// sign that is a float16 of 2^-8 times the value (its bias is 15, e4m3's 7), subnormals included.
inline void decode(const uint8_t* codes, vec out[4]) {
  for (int half = 0; half < 2; half++) {
    __m256i words = _mm256_cvtepi8_epi16(load_half(codes + 16 * half));
    words = _mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16(static_cast<short>(0xbfff)));
    out[2 * half] = _mm256_cvtph_ps(_mm256_castsi256_si128(words));
    out[2 * half + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1));
  }
}

// The way back. Adding and taking away 1.5 * 2^20 times a value's power of two rounds it to three bits of mantissa, and with
// no less than that of 2^(-6 - 8) to e4m3's subnormals; the float16 of the rest is exact. Zero would lose its sign.
inline __m128i encode_quarter(vec a, vec factor) {
  const vec most = set(448.0f / 256), sign = set(-0.0f);
  const __m256i exponent = _mm256_set1_epi32(0x7f800000), least = _mm256_set1_epi32((127 - 6 - 8) << 23);
  a = _mm256_mul_ps(a, factor);
  a = _mm256_min_ps(_mm256_max_ps(a, _mm256_or_ps(most, sign)), most);
  __m256i power = _mm256_max_epi32(_mm256_and_si256(_mm256_castps_si256(a), exponent), least);
  vec large = _mm256_castsi256_ps(_mm256_add_epi32(power, _mm256_set1_epi32(20 << 23 | 1 << 22)));
  vec nearest = _mm256_sub_ps(_mm256_add_ps(a, large), large);
  nearest = _mm256_or_ps(nearest, _mm256_and_ps(a, sign));
  return _mm256_cvtps_ph(nearest, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline void encode(const vec in[4], float factor, uint8_t* codes) {
  __m128i sixteen[2];
  for (int half = 0; half < 2; half++) {
    __m128i words[2];
    for (int i = 0; i < 2; i++) {
      __m128i quarter = encode_quarter(in[2 * half + i], set(factor));
      __m128i sign = _mm_and_si128(_mm_srli_epi16(quarter, 8), _mm_set1_epi16(0x80));
      words[i] = _mm_or_si128(_mm_and_si128(_mm_srli_epi16(quarter, 7), _mm_set1_epi16(0x7f)), sign);
    }
    sixteen[half] = _mm_packus_epi16(words[0], words[1]);
  }
  _mm256_storeu_si256(as<__m256i>(codes), _mm256_set_m128i(sixteen[1], sixteen[0]));
}

inline uint32_t largest_bits(const vec in[4]) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i eight = _mm256_setzero_si256();
  for (int i = 0; i < 4; i++) eight = _mm256_max_epi32(eight, _mm256_and_si256(_mm256_castps_si256(in[i]), magnitude));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1))));
}

inline bool any_nan(const uint8_t* codes) {
  __m256i block = _mm256_loadu_si256(as<__m256i>(codes));
  __m256i shifted = _mm256_add_epi8(block, block);  // the sign falls out: 0xfe is left of a NaN
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(shifted, _mm256_set1_epi8(static_cast<char>(0xfe)))) != 0;
}

}  // namespace
