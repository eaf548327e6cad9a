// Level "avx512": 16 floats a vector.
#pragma once

#include <immintrin.h>

#include "format.h"

namespace {

using vec = __m512;
constexpr int kWidth = 16;
constexpr int kDecodeExponent = 8;
constexpr int kEncodeExponent = 8;

inline vec zero() { return _mm512_setzero_ps(); }
inline vec set(float value) { return _mm512_set1_ps(value); }
inline vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
inline vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(vec a) {
  __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), upper);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline vec load(const f32* from) { return _mm512_loadu_ps(from); }
inline vec load(const bf16* from) {
  __m256i half = _mm256_loadu_si256(as<__m256i>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline vec load(const f16* from) { return _mm512_cvtph_ps(_mm256_loadu_si256(as<__m256i>(from))); }

// float32 to bfloat16 on integers: the instruction for it flushes subnormals.
inline __m256i to_bf16(vec a) {
  __m512i bits = _mm512_castps_si512(a);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  nearest = _mm512_mask_or_epi32(nearest, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(nearest, 16));
}

inline void store(f32* to, vec a) { _mm512_storeu_ps(to, a); }
inline void store(bf16* to, vec a) { _mm256_storeu_si256(as<__m256i>(to), to_bf16(a)); }
inline void store(f16* to, vec a) {
  __m256i half = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(as<__m256i>(to), half);
}

// The same past the caches: `to` is aligned. fence() makes what was streamed visible to other threads.
inline void stream(f32* to, vec a) { _mm512_stream_ps(as<float>(to), a); }
inline void stream(bf16* to, vec a) { _mm256_stream_si256(as<__m256i>(to), to_bf16(a)); }
inline void stream(f16* to, vec a) {
  __m256i half = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_stream_si256(as<__m256i>(to), half);
}
inline void fence() { _mm_sfence(); }

// e4m3 to float16: the sign extended word shifted left by 7 has sign, sign, exponent, mantissa; without the second
// sign that is a float16 of 2^-8 times the value (its bias is 15, e4m3's 7), subnormals included.
inline void decode(const uint8_t* codes, vec out[2]) {
  __m512i words = _mm512_cvtepi8_epi16(_mm256_loadu_si256(as<__m256i>(codes)));
  words = _mm512_and_si512(_mm512_slli_epi16(words, 7), _mm512_set1_epi16(static_cast<short>(0xbfff)));
  out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
  out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
}

// The way back. Adding and taking away 1.5 * 2^20 times a value's power of two rounds it to three bits of mantissa, and with
// no less than that of 2^(-6 - 8) to e4m3's subnormals; the float16 of the rest is exact. Zero would lose its sign.
inline __m256i encode_half(vec a, vec factor) {
  const vec most = set(448.0f / 256), sign = set(-0.0f);
  const __m512i exponent = _mm512_set1_epi32(0x7f800000), least = _mm512_set1_epi32((127 - 6 - 8) << 23);
  a = _mm512_mul_ps(a, factor);
  a = _mm512_min_ps(_mm512_max_ps(a, _mm512_sub_ps(zero(), most)), most);
  __m512i power = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a), exponent), least);
  vec large = _mm512_castsi512_ps(_mm512_add_epi32(power, _mm512_set1_epi32(20 << 23 | 1 << 22)));
  vec nearest = _mm512_sub_ps(_mm512_add_ps(a, large), large);
  nearest = _mm512_or_ps(nearest, _mm512_and_ps(a, sign));
  return _mm512_cvtps_ph(nearest, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline void encode(const vec in[2], float factor, uint8_t* codes) {
  __m512i words = _mm512_castsi256_si512(encode_half(in[0], set(factor)));
  words = _mm512_inserti64x4(words, encode_half(in[1], set(factor)), 1);
  __m512i magnitude = _mm512_srli_epi16(words, 7), signs = _mm512_srli_epi16(words, 8);
  words = _mm512_ternarylogic_epi32(_mm512_set1_epi16(0x80), signs, magnitude, 0xca);  // of 0x80 the first, else the second
  _mm256_storeu_si256(as<__m256i>(codes), _mm512_cvtepi16_epi8(words));
}

inline uint32_t largest_bits(const vec in[2]) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i a = _mm512_and_si512(_mm512_castps_si512(in[0]), magnitude);
  a = _mm512_max_epi32(a, _mm512_and_si512(_mm512_castps_si512(in[1]), magnitude));
  __m256i eight = _mm256_max_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1))));
}

inline bool any_nan(const uint8_t* codes) {
  __m256i block = _mm256_loadu_si256(as<__m256i>(codes));
  __m256i shifted = _mm256_add_epi8(block, block);  // the sign falls out: 0xfe is left of a NaN
  return _mm256_cmpeq_epi8_mask(shifted, _mm256_set1_epi8(static_cast<char>(0xfe))) != 0;
}

}  // namespace
