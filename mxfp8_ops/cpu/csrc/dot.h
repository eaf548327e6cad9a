// Level "avx512_bf16": e4m3 to bfloat16 by tables, and linear of few rows by dot products of bfloat16.
#pragma once

#include "rows.h"

#if MXFP8_LEVEL >= 3

namespace {

// The tables hold 2^kLift times the value. A scale byte s in [kLowestFast, kHighestFast] is then applied by taking
// kHighestFast - s from the exponent, in one saturating subtraction of words: only zero saturates, and stays zero.
constexpr int kLift = 40;
constexpr int kHighestFast = 127 + kLift;
constexpr int kLowestFast = 87;
// vdpbf16ps flushes subnormals. With x at least this large the products are multiples of 2^-126, and so are their sums:
// the unit of x is 2^-77 then, that of the weights 2^(-9 + 87 - 127).
constexpr int kLowestExponentOfX = -70;

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

inline bool is_fast(uint8_t scale) { return scale >= kLowestFast && scale <= kHighestFast; }

inline bool are_fast(const uint8_t* scales, int64_t count) {
  __mmask64 beyond = 0;
  for (int64_t i = 0; i < count; i += 64) {
    __mmask64 some = count - i < 64 ? (1ull << (count - i)) - 1 : ~0ull;
    __m512i above = _mm512_sub_epi8(_mm512_maskz_loadu_epi8(some, scales + i), _mm512_set1_epi8(kLowestFast));
    beyond |= _mm512_mask_cmpgt_epu8_mask(some, above, _mm512_set1_epi8(kHighestFast - kLowestFast));
  }
  return beyond == 0;
}

inline __m512 dot(__m512 total, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(total, (__m512bh)a, (__m512bh)b);
}

// sums[r][m] = x[m] . dequant(weight[r]), x in the order of pack_x. False if a block needs another way: sums are
// anything then.
template <int M, int R>
inline bool dot_tile(const bf16* x, int64_t stride, const uint8_t* codes, const uint8_t* scales, int64_t k,
                     float sums[R][M]) {
  if (!are_fast(scales, R * (k / kBlock))) return false;
  Decoder decode;
  __m512 total[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) total[r][m] = _mm512_setzero_ps();
  auto step = [&](int64_t column, bool half) {
    for (int r = 0; r < R; r++) {
      const uint8_t* row = codes + r * k;
      const uint8_t* pair = scales + r * (k / kBlock) + column / kBlock;
      prefetch(row, column, k, R);
      __m512i minus = minus_of(pair[0], pair[half ? 0 : 1]), even, odd;
      decode(load_codes(row + column, half), minus, minus, even, odd);
      for (int m = 0; m < M; m++) {
        const bf16* at = x + m * stride + column;
        total[r][m] = dot(total[r][m], even, _mm512_load_si512(at));
        total[r][m] = dot(total[r][m], odd, _mm512_load_si512(at + 32));
      }
    }
  };
  int64_t column = 0;
  for (; column + 64 <= k; column += 64) step(column, false);
  if (column < k) step(column, true);
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = sum(total[r][m]);
  return !decode.seen_nan();
}

// Columns of packed x: whole pairs of blocks.
inline int64_t packed_columns(int64_t k) { return (k + 63) / 64 * 64; }

// One row of x in the order in which Decoder gives weights, padded with zeros: of each 64 the pieces of eight
// 0, 2, 4, 6, 1, 3, 5, 7. False if it holds a value that is too small for dot products.
inline bool pack_x(const bf16* x, int64_t k, bf16* packed) {
  constexpr int kPiece = 8;
  const __m128i smallest = _mm_set1_epi16((127 + kLowestExponentOfX) << 7), one = _mm_set1_epi16(1);
  __mmask8 small = 0;
  for (int64_t at = 0; at < packed_columns(k); at += kPiece) {
    int64_t piece = at / kPiece % 8, to = at / 64 * 64 + (piece / 2 + piece % 2 * 4) * kPiece;
    __m128i eight = at < k ? _mm_loadu_si128(as<__m128i>(x + at)) : _mm_setzero_si128();
    _mm_store_si128(as<__m128i>(packed + to), eight);
    // Zero less one is the largest of all.
    __m128i magnitude = _mm_and_si128(eight, _mm_set1_epi16(0x7fff));
    small |= _mm_cmplt_epu16_mask(_mm_sub_epi16(magnitude, one), _mm_sub_epi16(smallest, one));
  }
  return small == 0;
}

}  // namespace

#endif
