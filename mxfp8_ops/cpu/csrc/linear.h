// linear: which tiles compute it.
#pragma once

#include "panels.h"
#include "problem.h"
#include "rows.h"
#include "streamed.h"
#include "wide.h"

namespace {

// --- float32 vectors ------------------------------------------------------------------------------------------------

// All rows of x by R rows of the weight; x as X, which is T or float32.
template <class T, int R, int M, class X>
void write_rows_tile(const Problem<T>& p, const X* x, int64_t stride, int64_t m, int64_t row) {
  float sums[R][M];
  rows_tile<T, M, R>(x + m * stride, stride, p.codes_of(row), p.scales_of(row), p.k, sums);
  for (int r = 0; r < R; r++)
    for (int i = 0; i < M; i++) p.write(m + i, row + r, sums[r][i]);
}

template <class T, int R, class X>
void write_rows(const Problem<T>& p, const X* x, int64_t stride, int64_t row) {
  int64_t m = 0;
  if constexpr (kVectors < 8)  // one row of the weight at a time, but decoded once for more rows of x
    for (; m + 8 <= p.m; m += 8)
      for (int r = 0; r < R; r++) write_rows_tile<T, 1, 8>(p, x, stride, m, row + r);
  for (; m + 4 <= p.m; m += 4) write_rows_tile<T, R, 4>(p, x, stride, m, row);
  for (; m + 2 <= p.m; m += 2) write_rows_tile<T, R, 2>(p, x, stride, m, row);
  if (m < p.m) write_rows_tile<T, R, 1>(p, x, stride, m, row);
}

#if MXFP8_LEVEL < 3

// x as float32, converted once unless it is that.
inline const f32* as_float32(const Problem<f32>& p, int64_t& stride) {
  stride = p.stride;
  return p.x;
}

template <class T>
const f32* as_float32(const Problem<T>& p, int64_t& stride) {
  static thread_local Buffer buffer;
  f32* out = buffer.at_least<f32>(p.m * p.k);
  stride = p.k;
#pragma omp parallel for num_threads(p.threads) if (p.m > 8 && p.threads > 1)
  for (int64_t m = 0; m < p.m; m++)
    for (int64_t i = 0; i < p.k; i += kWidth) store(out + m * p.k + i, load(p.x + m * p.stride + i));
  return out;
}

template <class T>
void linear(const Problem<T>& p) {
  int64_t stride;
  const f32* x = as_float32(p, stride);
  in_portions(p.n, p.k, threads_for(p.m * p.n * p.k, p.threads), kAnyTile, [&](int64_t row, int64_t last) {
    for (; p.m == 1 && row + 4 <= last; row += 4) write_rows<T, 4>(p, x, stride, row);
    for (; row + 2 <= last; row += 2) write_rows<T, 2>(p, x, stride, row);
    if (row < last) write_rows<T, 1>(p, x, stride, row);
  });
}

#else

// What the tables cannot do.
template <class T>
__attribute__((noinline, cold)) void write_exact(const Problem<T>& p, int64_t m, int64_t last_m, int64_t row, int64_t last) {
  for (; row < last; row++)
    for (int64_t i = m; i < last_m; i++) write_rows_tile<T, 1, 1>(p, p.x, p.stride, i, row);
}

// --- tables ---------------------------------------------------------------------------------------------------------

// Rows [m, m + M) of x, as far as there are any; `packed` has zeros beyond.
template <int M, class T, class X>
void linear_by_dots(const Problem<T>& p, const X* packed, int64_t m) {
  constexpr int R = M <= 4 ? 4 : 2;
  int64_t stride = packed_columns(p.k), last_m = m + M < p.m ? m + M : p.m;
  in_portions(p.n, p.k, threads_for(M * p.n * p.k, p.threads), kAnyTile, [&](int64_t row, int64_t last) {
    for (; row < last; row += R) {
      int rows = last - row < R ? static_cast<int>(last - row) : R;
      float sums[R][M];
      bool done = dot_tile<M, R>(packed + m * stride, stride, p.codes_of(row), p.scales_of(row), rows, p.k,
                                 kTableRange<T>, sums);
      if (!done) write_exact(p, m, last_m, row, row + rows);
      for (int r = 0; done && r < rows; r++)
        for (int64_t i = m; i < last_m; i++) p.write(i, row + r, sums[r][i - m]);
    }
  });
}

// Up to 8 rows of x, from row m on. Not for every number there is a tile: each takes the compiler a while.
template <class T, class X>
void linear_of_few(const Problem<T>& p, const X* packed, int64_t m) {
  int64_t rows = p.m - m;
  if (rows == 1) return linear_by_dots<1>(p, packed, m);
  if (rows == 2) return linear_by_dots<2>(p, packed, m);
  if (rows <= 4) return linear_by_dots<4>(p, packed, m);
  return linear_by_dots<8>(p, packed, m);
}

// x as X in the order of the tables; null if it holds a value that is too small for dot products.
template <class X, class T>
const X* packed_x(const Problem<T>& p) {
  static thread_local Buffer buffer;
  int64_t columns = packed_columns(p.k);
  int64_t rows = p.m <= 2 ? p.m : p.m <= 4 ? 4 : (p.m + 7) / 8 * 8;  // of whole tiles
  X* packed = buffer.at_least<X>(rows * columns);
  std::memset(static_cast<void*>(packed + p.m * columns), 0, (rows - p.m) * columns * sizeof(X));
  int fit = 1;
#pragma omp parallel for num_threads(p.threads) reduction(& : fit) if (p.m > 8 && p.threads > 1)
  for (int64_t m = 0; m < p.m; m++) fit &= pack_x(p.x + m * p.stride, p.k, packed + m * columns);
  return fit ? packed : nullptr;
}

#if MXFP8_LEVEL == 3

// Rows [m, m + 16 V) of x, as far as there are any.
template <int V>
void linear_wide(const Problem<bf16>& p, const bf16* packed, int64_t m) {
  static thread_local Buffer buffer;
  constexpr int R = wide_rows(V), kWidthOfX = V * kRowsOfX;
  int64_t columns = packed_columns(p.k), rows_of_x = p.m - m < kWidthOfX ? p.m - m : kWidthOfX;
  uint32_t* pairs = buffer.at_least<uint32_t>(columns / 2 * kWidthOfX);
  in_portions(columns / 2, 8 * kWidthOfX, p.threads, kAnyTile, [&](int64_t first, int64_t last) {
    pair_x(packed + m * columns, rows_of_x, columns, kWidthOfX, first, last, pairs);
  });
  in_portions(p.n, p.k, p.threads, kAnyTile, [&](int64_t row, int64_t last) {
    for (; row < last; row += R) {
      int rows = last - row < R ? static_cast<int>(last - row) : R;
      float sums[R][kWidthOfX];
      bool done = wide_tile<V, R>(pairs, p.codes_of(row), p.scales_of(row), rows, p.k, sums);
      if (!done) write_exact(p, m, m + rows_of_x, row, row + rows);
      for (int64_t i = 0; done && i < rows_of_x; i++)
        for (int r = 0; r < rows; r++) p.write(m + i, row + r, sums[r][i]);
    }
  });
}

#else

// --- matrix tiles ---------------------------------------------------------------------------------------------------

// Up to kMostStreamed rows of x, in groups of `width`.
inline void linear_streamed(const Problem<bf16>& p, const uint32_t* pairs, int64_t width) {
  constexpr decltype(&streamed_tile<1>) kTiles[] = {streamed_tile<1>, streamed_tile<2>, streamed_tile<3>, streamed_tile<4>};
  const auto tile = kTiles[(p.m - 1) / kTile];
  in_portions(p.n, p.k, p.threads, kTile, [&](int64_t row, int64_t last) {
    Tiles tiles(width);
    alignas(64) float sums[4 * kTile * kTile];
    for (; row < last; row += kTile) {
      const int rows = static_cast<int>(std::min<int64_t>(last - row, kTile));
      const bool done = tile(p, pairs, width, row, rows, sums);
      if (!done) write_exact(p, 0, p.m, row, row + rows);
      for (int64_t m = 0; done && m < p.m; m += width)
        write_sums(p, m, std::min(p.m - m, width), row, rows, sums + m * kTile, width);
    }
  });
}

// Rows [m, last_m) of x.
inline void linear_by_panels(const Problem<bf16>& p, const uint32_t* pairs, int64_t m, int64_t last_m) {
  constexpr int64_t kSize = kTile * kTile, kRows = kTogether * kTileRows;
  const int64_t groups = (last_m - m + kTile - 1) / kTile;
  in_portions(p.n, p.k, p.threads, kRows, [&](int64_t row, int64_t last) {
    static thread_local Buffer buffer;
    float* sums = buffer.at_least<float>(kTogether * groups * 2 * kSize);
    bool good[kTogether];
    Tiles tiles;
    for (; row < last; row += kRows) {
      const int64_t next = std::min(row + kRows, last);
      multiply_panels(p, pairs, groups, row, next, sums, good);
      for (int64_t r = row; r < next; r += kTile) {
        const int64_t rows = std::min<int64_t>(next - r, kTile), half = (r - row) / kTile;
        const float* of_rows = sums + (half / 2 * groups * 2 + half % 2) * kSize;
        const bool done = good[half / 2];
        if (!done) write_exact(p, m, last_m, r, r + rows);
        for (int64_t v = 0; done && v < groups; v++)
          write_sums(p, m + v * kTile, std::min<int64_t>(last_m - m - v * kTile, kTile), r, rows, of_rows + v * 2 * kSize, kTile);
      }
    }
  });
}

// False if x holds a value that is too small for dot products.
inline bool linear_tiled(const Problem<bf16>& p) {
  const int64_t width = p.m <= 2 ? 2 : p.m <= 4 ? 4 : p.m <= 8 ? 8 : kTile;  // fewer leave more of the L1 cache
  const uint32_t* pairs = paired_x(p, width);
  if (pairs == nullptr) return false;
  if (p.m <= kMostStreamed) {
    linear_streamed(p, pairs, width);
    return true;
  }
  for (int64_t m = 0; m < p.m; m += kMostRows)
    linear_by_panels(p, pairs + m * (packed_columns(p.k) / 2), m, std::min(m + kMostRows, p.m));
  return true;
}

#endif

// --- which of them --------------------------------------------------------------------------------------------------

// Any x, as float32.
template <class T>
void linear_of_floats(const Problem<T>& p) {
  const f32* packed = packed_x<f32>(p);
  for (int64_t m = 0; m < p.m; m += 8) linear_of_few(p, packed, m);
}

template <class T>
void linear(const Problem<T>& p) {
  linear_of_floats(p);
}

#if MXFP8_LEVEL == 3

template <>
void linear<bf16>(const Problem<bf16>& p) {
  const bf16* packed = packed_x<bf16>(p);
  if (packed == nullptr) return linear_of_floats(p);
  int64_t m = 0;
  for (; p.m - m > 48; m += 64) linear_wide<4>(p, packed, m);
  if (p.m - m > 32) return linear_wide<3>(p, packed, m);
  if (p.m - m > 16) return linear_wide<2>(p, packed, m);
  if (p.m - m > 8) return linear_wide<1>(p, packed, m);
  if (p.m - m > 0) linear_of_few(p, packed, m);
}

#else

// CPUs with matrix tiles multiply float32 twice as fast as pairs of bfloat16.
template <>
void linear<bf16>(const Problem<bf16>& p) {
  if (p.m == 1 || !linear_tiled(p)) linear_of_floats(p);
}

#endif

#endif

}  // namespace
