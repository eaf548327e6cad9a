// Level "amx_bf16": linear on bfloat16 by matrix tiles, 16 rows of the weight by 16 of x, 32 elements of K at a time.
#pragma once

#include <atomic>

#include "wide.h"

#if MXFP8_LEVEL >= 4

namespace {

constexpr int kTile = 16;              // rows of a tile, and columns of one of sums
constexpr int kTileRows = 2 * kTile;   // rows of the weight that are decoded together
constexpr int kTileColumns = 32;       // elements of K in a tile of bfloat16
constexpr int64_t kPairBytes = 1 << 20;  // of x, multiplied by the whole weight before the next: they stay in the L2 cache

// Eight tiles of 16 rows by 64 bytes: 0 to 3 are sums [r + 2 v], 4 and 5 weights, 6 and 7 pairs of x. A thread keeps what
// it is told until it lets go, which it must, or the system saves the tiles with it for ever.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
    } config;
    _tile_loadconfig(&config);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

// Compilers do not know that instructions on tiles read and write memory.
inline void compiled_in_order() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// sums[r][m], rows `width` apart, of 32 rows of a panel by V groups of 16 rows of x; added to what is there unless these
// are the first columns.
template <int V>
inline void multiply_tiles(const bf16* panel, const uint32_t* pairs, int64_t group, int64_t columns, float* sums,
                           int64_t width, bool first) {
  const int64_t stride = width * static_cast<int64_t>(sizeof(float)), panel_stride = kPanel * sizeof(bf16);
  float* lower = sums + kTile * width;
  compiled_in_order();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, stride);
    _tile_loadd(1, lower, stride);
    if (V == 2) {
      _tile_loadd(2, sums + kTile, stride);
      _tile_loadd(3, lower + kTile, stride);
    }
  }
  for (int64_t column = 0; column < columns; column += kTileColumns) {
    _tile_loadd(4, panel + column, panel_stride);
    _tile_loadd(5, panel + kTile * kPanel + column, panel_stride);
    _tile_loadd(6, pairs + column / 2 * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (V == 2) {
      _tile_loadd(7, pairs + group + column / 2 * kTile, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, stride);
  _tile_stored(1, lower, stride);
  if (V == 2) {
    _tile_stored(2, sums + kTile, stride);
    _tile_stored(3, lower + kTile, stride);
  }
  compiled_in_order();
}

// sums[r][m] of 16 `groups` rows of x, pairs [groups][K/2][16][2], by the first `rows` of 32 rows of the weight; the other
// sums are anything. False as in dot_tile.
inline bool tiled_rows(const uint32_t* pairs, int64_t groups, const uint8_t* codes, const uint8_t* scales, int rows,
                       int64_t k, float* sums) {
  if (!are_within(kTableRange<bf16>, scales, rows * (k / kBlock))) return false;
  alignas(64) static thread_local bf16 panel[kTileRows][kPanel];
  Decoder decode;
  const int64_t group = packed_columns(k) / 2 * kTile, width = groups * kTile;
  for (int64_t first = 0; first < k; first += kPanel) {
    int64_t last = first + kPanel < k ? first + kPanel : k, columns = packed_columns(last - first), v = 0;
    decode_panel(codes, scales, rows, k, first, last, decode, panel);
    const uint32_t* x = pairs + first / 2 * kTile;
    for (; v + 2 <= groups; v += 2)
      multiply_tiles<2>(panel[0], x + v * group, group, columns, sums + v * kTile, width, first == 0);
    if (v < groups) multiply_tiles<1>(panel[0], x + v * group, group, columns, sums + v * kTile, width, first == 0);
  }
  return !decode.seen_nan();
}

}  // namespace

#endif
