// Level "avx512_bf16": codes to exact bfloat16 values by tables, scales included, 64 at a time.
#pragma once

#include "vector.h"

#if MXFP8_LEVEL >= 3

namespace {

// The tables hold 2^kLift times the value. A scale byte s in [kLowestFast, kHighestFast] is then applied by taking
// kHighestFast - s from the exponent, in one saturating subtraction of words: only zero saturates, and stays zero.
constexpr int kLift = 40;
constexpr int kHighestFast = 127 + kLift;
constexpr int kLowestFast = 87;

// A code without its sign to the two bytes of a bfloat16. The high byte has its sign bit set, so that the code's own can
// be put there by one AND; zero alone has not, and so loses its sign, which no sum shows. NaN sets kNanMark.
constexpr uint8_t kNanMark = 0x20;  // no other high byte has that bit

constexpr int field_of(int code) {  // exponent and mantissa, as bfloat16 has them
  int exponent = code >> 3, mantissa = code & 7;
  if (exponent == 0) {  // mantissa * 2^-9
    int leading = mantissa >= 4 ? 2 : mantissa >= 2 ? 1 : 0;
    return (127 - 9 + leading) << 7 | ((mantissa << (7 - leading)) & 0x7f);
  }
  return (127 - 7 + exponent) << 7 | mantissa << 4;
}

struct Tables {
  alignas(64) uint8_t high[128] = {};
  alignas(64) uint8_t low[128] = {};
  uint32_t minus[256] = {};  // by scale byte, what to take from each of two words
  constexpr Tables() {
    for (int code = 1; code < kElementNan; code++) {
      int word = field_of(code) + (kLift << 7);
      high[code] = static_cast<uint8_t>(0x80 | word >> 8);
      low[code] = static_cast<uint8_t>(word);
    }
    high[kElementNan] = 0x80 | kNanMark;
    for (int s = kLowestFast; s <= kHighestFast; s++)
      minus[s] = static_cast<uint32_t>(kHighestFast - s) << 7 | static_cast<uint32_t>(kHighestFast - s) << 23;
  }
};
constexpr Tables kTables;

// Decodes 64 codes at a time. `seen` collects high bytes.
struct Decoder {
  __m512i high0 = _mm512_load_si512(kTables.high), high1 = _mm512_load_si512(kTables.high + 64);
  __m512i low0 = _mm512_load_si512(kTables.low), low1 = _mm512_load_si512(kTables.low + 64);
  __m512i seen = _mm512_setzero_si512();

  // 16-byte lanes stay lanes: even[i] of a lane are its codes 0 to 7, odd[i] its codes 8 to 15.
  inline void operator()(__m512i codes, __m512i minus_even, __m512i minus_odd, __m512i& even, __m512i& odd) {
    __m512i high = _mm512_permutex2var_epi8(high0, codes, high1);
    __m512i low = _mm512_permutex2var_epi8(low0, codes, low1);
    seen = _mm512_or_si512(seen, high);
    high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(0x7f), 0xe0);  // high & (codes | 0x7f)
    even = _mm512_subs_epu16(_mm512_unpacklo_epi8(low, high), minus_even);
    odd = _mm512_subs_epu16(_mm512_unpackhi_epi8(low, high), minus_odd);
  }

  bool seen_nan() const { return _mm512_test_epi8_mask(seen, _mm512_set1_epi8(kNanMark)) != 0; }
};

inline __m512i load_codes(const uint8_t* codes, bool half = false) {
  return half ? _mm512_maskz_loadu_epi8(0xffffffffull, codes) : _mm512_loadu_si512(codes);
}

// What to subtract from words of two blocks, the first in the lower half.
inline __m512i minus_of(uint8_t first, uint8_t second) {
  __m512i both = _mm512_set1_epi32(static_cast<int>(kTables.minus[first]));
  return _mm512_mask_set1_epi32(both, 0xff00, static_cast<int>(kTables.minus[second]));
}

// Scale bytes under which the tables give what dequantizing to T gives, unless an element is NaN.
struct Range {
  uint8_t lowest, highest;
};

template <class T>
constexpr Range kTableRange = {kLowestExact<T> > kLowestFast ? kLowestExact<T> : kLowestFast,
                               kHighestExact<T> < kHighestFast ? kHighestExact<T> : kHighestFast};

inline bool are_within(Range range, const uint8_t* scales, int64_t count) {
  const __m512i lowest = _mm512_set1_epi8(static_cast<char>(range.lowest));
  const __m512i most = _mm512_set1_epi8(static_cast<char>(range.highest - range.lowest));
  __mmask64 beyond = 0;
  for (int64_t i = 0; i < count; i += 64) {
    __mmask64 some = count - i < 64 ? (1ull << (count - i)) - 1 : ~0ull;
    __m512i above = _mm512_sub_epi8(_mm512_maskz_loadu_epi8(some, scales + i), lowest);
    beyond |= _mm512_mask_cmpgt_epu8_mask(some, above, most);
  }
  return beyond == 0;
}

}  // namespace

#endif
