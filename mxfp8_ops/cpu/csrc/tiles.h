// Level "amx_bf16": what products of matrix tiles are made of. 16 rows of the weight by 16 of x, 32 elements of K at a time.
#pragma once

#include <algorithm>
#include <atomic>

#include "dot.h"

#if MXFP8_LEVEL >= 4

namespace {

constexpr int kTile = 16;                        // rows of a tile, and columns of one of sums
constexpr int kTileColumns = 32;                 // elements of K in a tile of bfloat16
constexpr int kTileSize = kTile * kTileColumns;  // elements of such a tile
constexpr int kStep = 2 * kTileColumns;          // columns that are decoded together: two tiles

// Eight tiles of 16 rows by up to 64 bytes: 0 to 3 are sums, 4 and 5 weights, 6 and 7 pairs of x. A thread keeps what it is
// told until it lets go, which it must, or the system saves the tiles with it for ever.
struct Tiles {
  // Tiles of sums and of x have a column for each of up to 16 rows of x.
  explicit Tiles(int64_t rows_of_x = kTile) {
    const uint16_t x = static_cast<uint16_t>(rows_of_x * 4);
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {0, 0, 0, 0, 64, 64};
      uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
    } config;
    for (int tile : {0, 1, 2, 3, 6, 7}) config.bytes[tile] = x;
    asm volatile("" : : "r"(&config) : "memory");  // compilers think that only eight bytes of it are read
    _tile_loadconfig(&config);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

// Compilers do not know that instructions on tiles read and write memory.
inline void compiled_in_order() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// 16 by 16 words of 32 bits: first within each 4 by 4 of them, then those among each other.
inline void transpose(__m512i rows[kTile]) {
  for (int i = 0; i < kTile; i += 4) {
    __m512i *a = rows + i, low01 = _mm512_unpacklo_epi32(a[0], a[1]), high01 = _mm512_unpackhi_epi32(a[0], a[1]);
    __m512i low23 = _mm512_unpacklo_epi32(a[2], a[3]), high23 = _mm512_unpackhi_epi32(a[2], a[3]);
    a[0] = _mm512_unpacklo_epi64(low01, low23), a[1] = _mm512_unpackhi_epi64(low01, low23);
    a[2] = _mm512_unpacklo_epi64(high01, high23), a[3] = _mm512_unpackhi_epi64(high01, high23);
  }
  constexpr int kEven = 0x88, kOdd = 0xdd;
  for (int i = 0; i < 4; i++) {
    __m512i *a = rows + i, even01 = _mm512_shuffle_i32x4(a[0], a[4], kEven), odd01 = _mm512_shuffle_i32x4(a[0], a[4], kOdd);
    __m512i even23 = _mm512_shuffle_i32x4(a[8], a[12], kEven), odd23 = _mm512_shuffle_i32x4(a[8], a[12], kOdd);
    a[0] = _mm512_shuffle_i32x4(even01, even23, kEven), a[8] = _mm512_shuffle_i32x4(even01, even23, kOdd);
    a[4] = _mm512_shuffle_i32x4(odd01, odd23, kEven), a[12] = _mm512_shuffle_i32x4(odd01, odd23, kOdd);
  }
}

inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

// --- x ------------------------------------------------------------------------------------------------------------------

// kStep columns of up to 16 rows of x, or the half of them that is left, as pairs [kStep/2][width][2], in the order in which
// Decoder gives weights. False if a value is too small for dot products.
inline bool pair_step(const bf16* x, int64_t stride, int64_t rows, bool half, int64_t width, uint32_t* pairs) {
  __m512i even[kTile], odd[kTile];
  bool large = true;
  for (int r = 0; r < kTile; r++) {
    even[r] = odd[r] = _mm512_setzero_si512();
    if (r < rows) large &= in_order(x + r * stride, half, even[r], odd[r]);
  }
  transpose(even);
  transpose(odd);
  for (int i = 0; i < kTile; i++) {
    _mm512_mask_storeu_epi32(pairs + i * width, first_lanes(width), even[i]);
    _mm512_mask_storeu_epi32(pairs + (kTile + i) * width, first_lanes(width), odd[i]);
  }
  return large;
}

// All rows of x as pairs [groups][K/2][width][2], a group being `width` rows; null if a value is too small.
inline const uint32_t* paired_x(const Problem<bf16>& p, int64_t width) {
  static thread_local Buffer buffer;
  const int64_t steps = packed_columns(p.k) / kStep, groups = (p.m + width - 1) / width, step_size = kStep / 2 * width;
  uint32_t* pairs = buffer.at_least<uint32_t>(groups * steps * step_size);
  std::atomic<bool> fit{true};
  in_portions(groups * steps, 4 * step_size, threads_for(8 * groups * steps * step_size, p.threads), 1, [&](int64_t i, int64_t last) {
    for (; i < last; i++) {
      const int64_t m = i / steps * width, column = i % steps * kStep, rows = std::min(p.m - m, width);
      const bool half = p.k - column < kStep;
      if (!pair_step(p.x + m * p.stride + column, p.stride, rows, half, width, pairs + i * step_size)) fit = false;
    }
  });
  return fit ? pairs : nullptr;
}

// --- results ------------------------------------------------------------------------------------------------------------

// Of `rows` rows of the weight by `count` of x, from sums [16][width].
inline void write_sums(const Problem<bf16>& p, int64_t m, int64_t count, int64_t row, int64_t rows, const float* sums,
                       int64_t width) {
  const __mmask16 valid = first_lanes(rows);
  __m512i by_x[kTile];
  for (int r = 0; r < kTile; r++) by_x[r] = _mm512_maskz_loadu_epi32(first_lanes(width), sums + r * width);
  transpose(by_x);
  __m512i bias = _mm512_setzero_si512();
  if (p.bias != nullptr) bias = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, p.bias + row)), 16);
  for (int64_t i = 0; i < count; i++) {
    vec value = _mm512_castsi512_ps(by_x[i]);
    if (p.bias != nullptr) value = add(value, _mm512_castsi512_ps(bias));
    _mm256_mask_storeu_epi16(p.out + (m + i) * p.n + row, valid, to_bf16(value));
  }
}

}  // namespace

#endif
