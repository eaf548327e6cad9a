// From bfloat16 to codes in 16-bit integers, of which a vector holds twice as many as of floats: for blocks in which
// every value but zeros becomes a normal code, which are most.
#pragma once

#include "vector.h"

#if MXFP8_LEVEL >= 1

namespace {

// Scales under which a normal code's bits follow from those of the value.
constexpr int kLeastShort = 7, kMostShort = 245;

// Rounds the seven bits of mantissa to three; a carry goes to the exponent. Then the exponent's bias is 7 instead of 127,
// and the scale is taken out.
constexpr int kHalf = 7, kDropped = 4;
inline int moved(int byte) { return (byte - 7) << 3; }
inline int least_normal(int byte) { return (byte - 6) << 7; }

// The largest of eight 16-bit integers without sign, in the place of a float32's upper half.
inline uint32_t largest_of(__m128i eight) {
  __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
  return (0xffffu - static_cast<uint16_t>(_mm_cvtsi128_si32(least))) << 16;
}
inline uint32_t largest_of(__m256i sixteen) {
  return largest_of(_mm_max_epu16(_mm256_castsi256_si128(sixteen), _mm256_extracti128_si256(sixteen, 1)));
}

#if MXFP8_LEVEL >= 2

inline __m512i short_words(int value) { return _mm512_set1_epi16(static_cast<short>(value)); }

inline uint32_t largest_bits(const bf16* x) {
  __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(x), short_words(0x7fff));
  return largest_of(_mm256_max_epu16(_mm512_castsi512_si256(magnitude), _mm512_extracti64x4_epi64(magnitude, 1)));
}

// The codes of a block under a scale; false where that is not to be done so.
inline bool encode_normal(const bf16* x, int byte, uint8_t* codes) {
  __m512i bits = _mm512_loadu_si512(x), magnitude = _mm512_and_si512(bits, short_words(0x7fff));
  __mmask32 filled = _mm512_test_epi16_mask(magnitude, magnitude);
  if (_mm512_mask_cmplt_epu16_mask(filled, magnitude, short_words(least_normal(byte)))) return false;
  __m512i odd = _mm512_and_si512(_mm512_srli_epi16(magnitude, kDropped), short_words(1));
  __m512i nearest = _mm512_add_epi16(magnitude, _mm512_add_epi16(odd, short_words(kHalf)));
  nearest = _mm512_sub_epi16(_mm512_srli_epi16(nearest, kDropped), short_words(moved(byte)));
  nearest = _mm512_maskz_min_epu16(filled, nearest, short_words(kElementMost));
  __m512i words = _mm512_ternarylogic_epi32(short_words(0x80), _mm512_srli_epi16(bits, 8), nearest, 0xca);
  _mm256_storeu_si256(as<__m256i>(codes), _mm512_cvtepi16_epi8(words));
  return true;
}

#else

inline __m256i short_words(int value) { return _mm256_set1_epi16(static_cast<short>(value)); }
inline __m256i sixteen(const bf16* x) { return _mm256_loadu_si256(as<__m256i>(x)); }

inline uint32_t largest_bits(const bf16* x) {
  const __m256i magnitude = short_words(0x7fff);
  return largest_of(_mm256_max_epu16(_mm256_and_si256(sixteen(x), magnitude), _mm256_and_si256(sixteen(x + 16), magnitude)));
}

inline bool encode_normal(const bf16* x, int byte, uint8_t* codes) {
  __m256i words[2], small = _mm256_setzero_si256();
  for (int half = 0; half < 2; half++) {
    __m256i bits = sixteen(x + 16 * half), magnitude = _mm256_and_si256(bits, short_words(0x7fff));
    __m256i empty = _mm256_cmpeq_epi16(magnitude, _mm256_setzero_si256());
    __m256i below = _mm256_cmpgt_epi16(short_words(least_normal(byte)), magnitude);
    small = _mm256_or_si256(small, _mm256_andnot_si256(empty, below));
    __m256i odd = _mm256_and_si256(_mm256_srli_epi16(magnitude, kDropped), short_words(1));
    __m256i nearest = _mm256_add_epi16(magnitude, _mm256_add_epi16(odd, short_words(kHalf)));
    nearest = _mm256_sub_epi16(_mm256_srli_epi16(nearest, kDropped), short_words(moved(byte)));
    nearest = _mm256_andnot_si256(empty, _mm256_min_epu16(nearest, short_words(kElementMost)));
    words[half] = _mm256_or_si256(nearest, _mm256_and_si256(_mm256_srli_epi16(bits, 8), short_words(0x80)));
  }
  if (!_mm256_testz_si256(small, small)) return false;
  __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(words[0], words[1]), 0xd8);
  _mm256_storeu_si256(as<__m256i>(codes), bytes);
  return true;
}

#endif

}  // namespace

#endif
