// Level "avx512_bf16" alone, more rows of x: 16 of them in one vector, against pairs of weights broadcast from a decoded panel.
#pragma once

#include "dot.h"

#if MXFP8_LEVEL == 3

namespace {

constexpr int kRowsOfX = 16;   // in a vector
constexpr int kPanel = 512;    // columns decoded at a time: they stay in the L1 cache

// Rows of the weight in a tile, by vectors of x: as many sums as there are registers for.
constexpr int wide_rows(int vectors) { return vectors == 1 ? 12 : vectors == 4 ? 4 : 8; }

// Decodes columns [first, last): panel [rows][kPanel]. Column by column, so that many rows are read from at once: row by row
// took up to 15 % longer.
inline void decode_panel(const uint8_t* codes, const uint8_t* scales, int rows, int64_t k, int64_t first, int64_t last,
                         Decoder& decode, bf16 panel[][kPanel]) {
  for (int64_t column = first; column < last; column += 64) {
    const int64_t ahead = ahead_of<kPanel>(column, k, rows);
    decode_rows(codes + column, scales + column / kBlock, k, rows, column + 64 > k, ahead, decode, panel[0] + column - first,
                kPanel, 32);
  }
}

// sums[r][m] of 16 V rows of x, pairs [K/2][16 V][2], by the first `rows` of R rows of the weight; the other sums are
// anything. False as in dot_tile.
template <int V, int R>
__attribute__((noinline)) bool wide_tile(const uint32_t* pairs, const uint8_t* codes, const uint8_t* scales, int rows,
                                         int64_t k, float sums[R][V * kRowsOfX]) {
  if (!are_within(kTableRange<bf16>, scales, rows * (k / kBlock))) return false;
  alignas(64) bf16 panel[R][kPanel] = {};
  Decoder decode;
  __m512 total[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) total[r][v] = _mm512_setzero_ps();
  for (int64_t first = 0; first < k; first += kPanel) {
    int64_t last = first + kPanel < k ? first + kPanel : k;
    decode_panel(codes, scales, rows, k, first, last, decode, panel);
    const uint32_t* x = pairs + first / 2 * (V * kRowsOfX);
    for (int64_t pair = 0; pair < packed_columns(last - first) / 2; pair++, x += V * kRowsOfX) {
      __m512i side[V];
      for (int v = 0; v < V; v++) side[v] = _mm512_load_si512(x + v * kRowsOfX);
      for (int r = 0; r < R; r++) {
        int weights;
        std::memcpy(&weights, panel[r] + 2 * pair, sizeof weights);
        for (int v = 0; v < V; v++) total[r][v] = dot(total[r][v], side[v], _mm512_set1_epi32(weights));
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) _mm512_storeu_ps(sums[r] + v * kRowsOfX, total[r][v]);
  return !decode.seen_nan();
}

// From rows [m][K] in the order of pack_x to pairs [K/2][width][2]; rows from m to width are zeros.
inline void pair_x(const bf16* packed, int64_t m, int64_t columns, int64_t width, int64_t first, int64_t last,
                   uint32_t* pairs) {
  for (int64_t pair = first; pair < last; pair++)
    for (int64_t row = 0; row < width; row++) {
      uint32_t two = 0;
      if (row < m) std::memcpy(&two, packed + row * columns + 2 * pair, sizeof two);
      pairs[pair * width + row] = two;
    }
}

}  // namespace

#endif
