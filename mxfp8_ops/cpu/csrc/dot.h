// Level "avx512_bf16": linear of few rows with weights from the tables. x in bfloat16 is multiplied as it is, by dot products
// of pairs; other x as float32.
#pragma once

#include "rows.h"
#include "tables.h"

#if MXFP8_LEVEL >= 3

namespace {

// vdpbf16ps flushes subnormals. With x at least this large the products are multiples of 2^-126, and so are their sums:
// the unit of x is 2^-77 then, that of the weights 2^(-9 + 87 - 127).
constexpr int kLowestExponentOfX = -70;

// Columns of packed x: whole pairs of blocks.
inline int64_t packed_columns(int64_t k) { return (k + 63) / 64 * 64; }

inline __m512 dot(__m512 total, __m512i a, __m512i b) { return _mm512_dpbf16_ps(total, (__m512bh)a, (__m512bh)b); }

// Adds the products of 64 weights and 64 of x.
inline vec multiply(vec total, __m512i even, __m512i odd, const bf16* x) {
  return dot(dot(total, even, _mm512_load_si512(x)), odd, _mm512_load_si512(x + 32));
}

// A bfloat16 is the upper half of a float32.
inline vec upper(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline vec lower(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }

inline vec multiply(vec total, __m512i even, __m512i odd, const f32* x) {
  total = fma(lower(even), load(x), total);
  total = fma(upper(even), load(x + 16), total);
  total = fma(lower(odd), load(x + 32), total);
  return fma(upper(odd), load(x + 48), total);
}

// sums[r][m] = x[m] . dequant(weight[r]), x as pack_x leaves it, for the first `rows` of R rows: the others repeat the last
// of them. False if a block needs another way: sums are anything then.
template <int M, int R, class X>
__attribute__((noinline)) bool dot_tile(const X* x, int64_t stride, const uint8_t* codes, const uint8_t* scales, int rows,
                                        int64_t k, Range range, float sums[R][M]) {
  if (!are_within(range, scales, rows * (k / kBlock))) return false;
  const uint8_t* row[R];
  const uint8_t* row_scales[R];
  for (int r = 0; r < R; r++) {
    row[r] = codes + (r < rows ? r : rows - 1) * k;
    row_scales[r] = scales + (r < rows ? r : rows - 1) * (k / kBlock);
  }
  Decoder decode;
  vec total[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) total[r][m] = zero();
  auto step = [&](int64_t column, bool half) {
    for (int r = 0; r < R; r++) {
      const uint8_t* pair = row_scales[r] + column / kBlock;
      prefetch(row[r], column, k, R);
      __m512i minus = minus_of(pair[0], pair[half ? 0 : 1]), even, odd;
      decode(load_codes(row[r] + column, half), minus, minus, even, odd);
      for (int m = 0; m < M; m++) total[r][m] = multiply(total[r][m], even, odd, x + m * stride + column);
    }
  };
  int64_t column = 0;
  for (; column + 64 <= k; column += 64) step(column, false);
  if (column < k) step(column, true);
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = sum(total[r][m]);
  return !decode.seen_nan();
}

// --- x in the order in which Decoder gives weights, padded with zeros -------------------------------------------------

inline bool are_large(__m512i words) {  // zeros are: zero less one is the largest of all
  const __m512i smallest = _mm512_set1_epi16((127 + kLowestExponentOfX) << 7), one = _mm512_set1_epi16(1);
  __m512i magnitude = _mm512_and_si512(words, _mm512_set1_epi16(0x7fff));
  return _mm512_cmplt_epu16_mask(_mm512_sub_epi16(magnitude, one), _mm512_sub_epi16(smallest, one)) == 0;
}

// 64 columns, or the half of them that is left: pieces of eight 0, 2, 4, 6 and 1, 3, 5, 7. False if a value is too small for
// dot products.
inline bool in_order(const bf16* x, bool half, __m512i& even, __m512i& odd) {
  __m512i lower = _mm512_loadu_si512(x), upper = half ? _mm512_setzero_si512() : _mm512_loadu_si512(x + 32);
  even = _mm512_shuffle_i32x4(lower, upper, 0x88);
  odd = _mm512_shuffle_i32x4(lower, upper, 0xdd);
  return are_large(lower) && are_large(upper);
}

// False as in_order.
inline bool pack_x(const bf16* x, int64_t k, bf16* packed) {
  bool large = true;
  for (int64_t column = 0; column < k; column += 64) {
    __m512i even, odd;
    large &= in_order(x + column, k - column < 64, even, odd);
    _mm512_store_si512(packed + column, even);
    _mm512_store_si512(packed + column + 32, odd);
  }
  return large;
}

// As float32: of each two such pieces first the lower words, then the upper ones.
template <class T>
bool pack_x(const T* x, int64_t k, f32* packed) {
  const __m512i lowers = _mm512_setr_epi32(0, 2, 4, 6, 16, 18, 20, 22, 32, 34, 36, 38, 48, 50, 52, 54);
  for (int64_t column = 0; column < packed_columns(k); column += 64) {
    f32 values[64] = {};
    for (int i = 0; i < 64 && column + i < k; i += kWidth) store(values + i, load(x + column + i));
    for (int i = 0; i < 4; i++) {  // lower, upper of even; lower, upper of odd
      __m512i from = _mm512_add_epi32(lowers, _mm512_set1_epi32(i % 2 + i / 2 * 8));
      store(packed + column + 16 * i, _mm512_i32gather_ps(from, as<float>(values), 4));
    }
  }
  return true;
}

// --- weights in memory, for more rows of x -------------------------------------------------------------------------------

// Decodes 64 columns of some rows, in the same order: the even pieces to rows `pitch` apart, the odd ones so many elements
// after them. Weights that follow `ahead` bytes later are asked for.
inline void decode_rows(const uint8_t* codes, const uint8_t* scales, int64_t k, int64_t rows, bool half, int64_t ahead,
                        Decoder& decode, bf16* to, int64_t pitch, int64_t odd_after) {
  for (int64_t r = 0; r < rows; r++) {
    __m512i minus = minus_of(scales[0], scales[half ? 0 : 1]), even, odd;
    ask_for(codes, ahead);
    decode(load_codes(codes, half), minus, minus, even, odd);
    _mm512_store_si512(to, even);
    _mm512_store_si512(to + odd_after, odd);
    codes += k;
    scales += k / kBlock;
    to += pitch;
  }
}

}  // namespace

#endif
