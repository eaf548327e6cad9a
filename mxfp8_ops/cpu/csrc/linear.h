// linear: which tiles compute it.
#pragma once

#include "problem.h"
#include "rows.h"
#include "wide.h"

namespace {

// --- float32 vectors ------------------------------------------------------------------------------------------------

template <class T, int M, int R, class X>
void write_rows_tile(const Problem<T>& p, const X* x, int64_t stride, int64_t m, int64_t row) {
  float sums[R][M];
  rows_tile<T, M, R>(x + m * stride, stride, p.codes_of(row), p.scales_of(row), p.k, sums);
  for (int r = 0; r < R; r++)
    for (int i = 0; i < M; i++) p.write(m + i, row + r, sums[r][i]);
}

template <class T, int R, class X>
void write_rows(const Problem<T>& p, const X* x, int64_t stride, int64_t row) {
  int64_t m = 0;
  for (; m + 4 <= p.m; m += 4) write_rows_tile<T, 4, R>(p, x, stride, m, row);
  if (p.m - m == 3) write_rows_tile<T, 3, R>(p, x, stride, m, row);
  if (p.m - m == 2) write_rows_tile<T, 2, R>(p, x, stride, m, row);
  if (p.m - m == 1) write_rows_tile<T, 1, R>(p, x, stride, m, row);
}

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
  int64_t blocks = p.k / kBlock;
#pragma omp parallel for num_threads(p.threads) if (p.m > 8 && p.threads > 1)
  for (int64_t m = 0; m < p.m; m++)
    for (int64_t i = 0; i < blocks * kVectors; i++) store(out + m * p.k + i * kWidth, load(p.x + m * p.stride + i * kWidth));
  return out;
}

template <class T>
void linear_by_rows(const Problem<T>& p) {
  int64_t stride;
  const f32* x = as_float32(p, stride);
  in_portions(p.n, p.k, threads_for(p.m * p.n * p.k, p.threads), [&](int64_t row, int64_t last) {
    if (p.m == 1)
      for (; row + 4 <= last; row += 4) write_rows<T, 4>(p, x, stride, row);
    for (; row + 2 <= last; row += 2) write_rows<T, 2>(p, x, stride, row);
    if (row < last) write_rows<T, 1>(p, x, stride, row);
  });
}

template <class T>
void linear(const Problem<T>& p) {
  linear_by_rows(p);
}

// --- dot products of bfloat16 ---------------------------------------------------------------------------------------

#if MXFP8_LEVEL >= 3

template <int M, int R>
void write_dot_tile(const Problem<bf16>& p, const bf16* packed, int64_t row) {
  float sums[R][M];
  if (!dot_tile<M, R>(packed, packed_columns(p.k), p.codes_of(row), p.scales_of(row), p.k, sums)) {
    for (int r = 0; r < R; r++) write_rows<bf16, 1>(p, p.x, p.stride, row + r);
    return;
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) p.write(m, row + r, sums[r][m]);
}

template <int M, int R>
void linear_by_dots(const Problem<bf16>& p, const bf16* packed) {
  in_portions(p.n, p.k, threads_for(p.m * p.n * p.k, p.threads), [&](int64_t row, int64_t last) {
    for (; row + R <= last; row += R) write_dot_tile<M, R>(p, packed, row);
    for (; row < last; row++) write_dot_tile<M, 1>(p, packed, row);
  });
}

template <int V, int R>
void write_wide_tile(const Problem<bf16>& p, const uint32_t* pairs, int64_t m, int64_t row) {
  float sums[R][V * kRowsOfX];
  int64_t rows_of_x = p.m - m < V * kRowsOfX ? p.m - m : V * kRowsOfX;
  if (!wide_tile<V, R>(pairs, p.codes_of(row), p.scales_of(row), p.k, sums)) {
    Problem<bf16> part = p;
    part.x += m * p.stride, part.out += m * p.n, part.m = rows_of_x;
    for (int r = 0; r < R; r++) write_rows<bf16, 1>(part, part.x, part.stride, row + r);
    return;
  }
  for (int64_t i = 0; i < rows_of_x; i++)
    for (int r = 0; r < R; r++) p.write(m + i, row + r, sums[r][i]);
}

// Rows [m, m + 16 V) of x, as far as there are any.
template <int V>
void linear_wide(const Problem<bf16>& p, const bf16* packed, int64_t m) {
  static thread_local Buffer buffer;
  constexpr int R = wide_rows(V), kWidthOfX = V * kRowsOfX;
  int64_t columns = packed_columns(p.k), rows_of_x = p.m - m < kWidthOfX ? p.m - m : kWidthOfX;
  uint32_t* pairs = buffer.at_least<uint32_t>(columns / 2 * kWidthOfX);
  in_portions(columns / 2, 8 * kWidthOfX, p.threads, [&](int64_t first, int64_t last) {
    pair_x(packed + m * columns, rows_of_x, columns, kWidthOfX, first, last, pairs);
  });
  in_portions(p.n, p.k, p.threads, [&](int64_t row, int64_t last) {
    for (; row + R <= last; row += R) write_wide_tile<V, R>(p, pairs, m, row);
    for (; row < last; row++) write_wide_tile<V, 1>(p, pairs, m, row);
  });
}

// Packs x; null if it holds a value that is too small for dot products.
inline const bf16* packed_x(const Problem<bf16>& p) {
  static thread_local Buffer buffer;
  int64_t columns = packed_columns(p.k);
  bf16* packed = buffer.at_least<bf16>(p.m * columns);
  int fit = 1;
#pragma omp parallel for num_threads(p.threads) reduction(& : fit) if (p.m > 8 && p.threads > 1)
  for (int64_t m = 0; m < p.m; m++) fit &= pack_x(p.x + m * p.stride, p.k, packed + m * columns);
  return fit ? packed : nullptr;
}

template <>
void linear<bf16>(const Problem<bf16>& p) {
  const bf16* packed = packed_x(p);
  if (packed == nullptr) return linear_by_rows(p);
  switch (p.m) {
    case 1: return linear_by_dots<1, 4>(p, packed);
    case 2: return linear_by_dots<2, 4>(p, packed);
    case 3: return linear_by_dots<3, 4>(p, packed);
    case 4: return linear_by_dots<4, 4>(p, packed);
    case 5: return linear_by_dots<5, 2>(p, packed);
    case 6: return linear_by_dots<6, 2>(p, packed);
    case 7: return linear_by_dots<7, 2>(p, packed);
    case 8: return linear_by_dots<8, 2>(p, packed);
    default: break;
  }
  int64_t m = 0;
  for (; m + 48 < p.m; m += 64) linear_wide<4>(p, packed, m);
  if (p.m - m > 32) return linear_wide<3>(p, packed, m);
  if (p.m - m > 16) return linear_wide<2>(p, packed, m);
  if (p.m - m > 0) return linear_wide<1>(p, packed, m);
}

#endif

}  // namespace
