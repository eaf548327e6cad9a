// Level "amx_bf16": linear on bfloat16 by matrix tiles, 16 rows of the weight by 16 of x, 32 elements of K at a time.
#pragma once

#include <algorithm>
#include <atomic>

#include "wide.h"

#if MXFP8_LEVEL >= 4

namespace {

constexpr int kTile = 16;              // rows of a tile, and columns of one of sums
constexpr int kTileRows = 2 * kTile;   // rows of the weight in a panel
constexpr int kTileColumns = 32;       // elements of K in a tile of bfloat16
constexpr int kStep = 64;              // columns decoded at a time for few rows of x
constexpr int64_t kStreamAhead = 256;  // bytes of a weight's row between these and what is asked for
constexpr int kTogether = 4;           // tiles of the weight for which a part of x stays in the L2 cache
constexpr int64_t kMostRows = 512;     // of x, multiplied by the whole weight before the next

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

// --- few rows of x: as fast as the weight can be read ---------------------------------------------------------------

// Adds the products of kStep columns of 16 rows of the weight with V groups of `width` rows of x to tiles: one for each group
// and each half of the columns. In one tile all products of a group would wait for each other.
template <int V>
inline void multiply_step(const bf16 panel[kTile][kStep], const uint32_t* pairs, int64_t width, int64_t group) {
  constexpr int64_t kStride = kStep * sizeof(bf16);
  const int64_t stride = width * static_cast<int64_t>(sizeof(uint32_t));
  const uint32_t* second = pairs + kTileColumns / 2 * width;
  compiled_in_order();
  _tile_loadd(4, panel[0], kStride);
  _tile_loadd(5, panel[0] + kTileColumns, kStride);
  _tile_loadd(6, pairs, stride);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, second, stride);
  _tile_dpbf16ps(1, 5, 7);
  if (V == 2) {
    _tile_loadd(6, pairs + group, stride);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(7, second + group, stride);
    _tile_dpbf16ps(3, 5, 7);
  }
  compiled_in_order();
}

// sums[r][V][width] of V groups of as many rows of x, pairs [V][K/2][width][2], by the first `rows` of 16 rows of the weight.
// Steps are short, and sums stay in tiles: while the matrix unit works on one step the next is decoded, and reading the
// weight never pauses. With 32 rows, or longer steps, what was asked for would leave the L1 cache before it is used. False as
// in dot_tile.
template <int V>
__attribute__((noinline)) bool streamed_tile(const Problem<bf16>& p, const uint32_t* pairs, int64_t width, int64_t row,
                                             int rows, float* sums) {
  if (!are_within(kTableRange<bf16>, p.scales_of(row), rows * (p.k / kBlock))) return false;
  alignas(64) bf16 panel[kTile][kStep] = {};
  const int64_t step_of_x = kStep / 2 * width, group = packed_columns(p.k) / 2 * width;
  Decoder decode;
  compiled_in_order();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step * kStep < p.k; step++) {
    decode_columns<kStreamAhead>(p.codes_of(row), p.scales_of(row), rows, p.k, step * kStep, decode, panel[0], kStep);
    multiply_step<V>(panel, pairs + step * step_of_x, width, group);
  }
  float parts[4][kTile * kTile];
  const int64_t stride = width * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, parts[0], stride);
  _tile_stored(1, parts[1], stride);
  _tile_stored(2, parts[2], stride);
  _tile_stored(3, parts[3], stride);
  compiled_in_order();
  for (int r = 0; r < kTile; r++)
    for (int v = 0; v < V; v++)
      for (int64_t i = 0; i < width; i++)
        sums[(r * V + v) * width + i] = parts[2 * v][r * width + i] + parts[2 * v + 1][r * width + i];
  return !decode.seen_nan();
}

// --- more rows of x: panels, multiplied by all of them ----------------------------------------------------------------

// sums[r][m] of 16 `groups` rows of x, pairs [groups][K/2][16][2], by rows [row, last) of the weight, at most kTogether
// tiles, which take turns with each part of x. Where good[tile] is false, as from dot_tile, the sums are anything.
inline void tiled_rows(const Problem<bf16>& p, const uint32_t* pairs, int64_t groups, int64_t row, int64_t last, float* sums,
                       bool good[kTogether]) {
  alignas(64) static thread_local bf16 panel[kTileRows][kPanel];
  const int64_t group = packed_columns(p.k) / 2 * kTile, width = groups * kTile;
  const int64_t tiles = (last - row + kTileRows - 1) / kTileRows;
  auto rows_of = [&](int64_t tile) { return static_cast<int>(std::min<int64_t>(last - row - tile * kTileRows, kTileRows)); };
  for (int64_t t = 0; t < tiles; t++)
    good[t] = are_within(kTableRange<bf16>, p.scales_of(row + t * kTileRows), rows_of(t) * (p.k / kBlock));
  for (int64_t first = 0; first < p.k; first += kPanel) {
    const int64_t next = std::min<int64_t>(first + kPanel, p.k), columns = packed_columns(next - first);
    const uint32_t* x = pairs + first / 2 * kTile;
    for (int64_t t = 0; t < tiles; t++) {
      if (!good[t]) continue;
      const int64_t from = row + t * kTileRows;
      Decoder decode;
      decode_panel(p.codes_of(from), p.scales_of(from), rows_of(t), p.k, first, next, decode, panel);
      good[t] = !decode.seen_nan();
      float* tile_sums = sums + t * kTileRows * width;
      int64_t v = 0;
      for (; v + 2 <= groups; v += 2)
        multiply_tiles<2>(panel[0], x + v * group, group, columns, tile_sums + v * kTile, width, first == 0);
      if (v < groups) multiply_tiles<1>(panel[0], x + v * group, group, columns, tile_sums + v * kTile, width, first == 0);
    }
  }
}

}  // namespace

#endif
