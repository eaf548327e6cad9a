// linear on float32 vectors, for every level and dtype: a tile of M rows of x by R rows of the weight, along all of K.
#pragma once

#include "block.h"

namespace {

constexpr int64_t kAhead = 1024;  // bytes of a weight's row between what is read and what is asked for

// From a column to where the weight will be read next: further along the row, or past its end in the row that the next tile
// begins with.
template <int64_t Ahead = kAhead>
inline int64_t ahead_of(int64_t column, int64_t k, int64_t rows) {
  return column + Ahead < k ? Ahead : Ahead + (rows - 1) * k;
}

// Memory may end before that.
inline void ask_for(const void* from, int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(ahead)));
}

inline void prefetch(const uint8_t* row, int64_t column, int64_t k, int rows) {
  ask_for(row + column, ahead_of(column, k, rows));
}

// sums[r][m] = x[m] . dequant(weight[r]), weights rounded to T. X is what x is kept as, T or float32.
template <class T, int M, int R, class X>
inline void rows_tile(const X* x, int64_t stride, const uint8_t* codes, const uint8_t* scales, int64_t k,
                      float sums[R][M]) {
  // In short vectors sums are kept in two parts: one would be less exact than those of others, and its additions would wait
  // for each other.
  constexpr int kParts = kVectors >= 8 ? 2 : 1;
  vec total[R][M][kParts];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++)
      for (int i = 0; i < kParts; i++) total[r][m][i] = zero();
  for (int64_t block = 0; block < k / kBlock; block++) {
    for (int r = 0; r < R; r++) {
      const uint8_t* row = codes + r * k;
      if (block % 2 == 0) prefetch(row, block * kBlock, k, R);  // a cache line is two blocks
      vec weights[kVectors];
      dequant_block<T>(row + block * kBlock, scales[r * (k / kBlock) + block], weights);
      for (int m = 0; m < M; m++)
        for (int i = 0; i < kVectors; i++) {
          vec& part = total[r][m][i % kParts];
          part = fma(weights[i], load(x + m * stride + block * kBlock + i * kWidth), part);
        }
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[r][m] = sum(kParts == 2 ? add(total[r][m][0], total[r][m][kParts - 1]) : total[r][m][0]);
}

}  // namespace
