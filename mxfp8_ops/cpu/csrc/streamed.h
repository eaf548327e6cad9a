// Level "amx_bf16", up to 64 rows of x: tiles of the weight along all of K, whose sums stay in registers. Each step is
// decoded while the one before is multiplied, and short: longer ones, or 32 rows of the weight, would leave the L1 cache
// before they are used.
#pragma once

#include "tiles.h"

#if MXFP8_LEVEL >= 4

namespace {

constexpr int64_t kMostStreamed = 4 * kTile;  // rows of x
constexpr int64_t kStreamAhead = 256;         // bytes of a weight's row between what is read and what is asked for
constexpr int kQuarter = kTile / 4;           // rows decoded between two products

using StepPanel = bf16[2][kTileSize];  // both halves of the columns of a step

// A quarter of a step's product with V groups of `width` rows of x, pairs [V][K/2][width][2]: one half of the columns, and one
// half of the groups. Sums of more than two groups are tiles 0 to V - 1. Those of one or two are two tiles each, i and i + 2,
// one for each half of the columns: products wait less for each other then.
template <int V, int Quarter>
inline void multiply_quarter(const StepPanel& panel, const uint32_t* pairs, int64_t width, int64_t group) {
  constexpr int kHalf = Quarter / 2, kPart = Quarter % 2, kGroups = V > 2 ? 2 : 1;
  constexpr bool kTwo = kGroups == 2 && kPart * 2 + 1 < V;
  if constexpr (kPart * kGroups >= V) return;
  const int64_t stride = width * static_cast<int64_t>(sizeof(uint32_t));
  const uint32_t* x = pairs + kHalf * (kTileColumns / 2 * width) + kPart * kGroups * group;
  compiled_in_order();
  if constexpr (kPart == 0) _tile_loadd(4, panel[kHalf], 64);
  _tile_loadd(6, x, stride);
  if constexpr (kTwo) _tile_loadd(7, x + group, stride);
  constexpr int kSums = kGroups == 2 ? kPart * 2 : kHalf * 2 + kPart;
  if constexpr (kSums == 0) _tile_dpbf16ps(0, 4, 6);
  if constexpr (kSums == 1) _tile_dpbf16ps(1, 4, 6);
  if constexpr (kSums == 2) _tile_dpbf16ps(2, 4, 6);
  if constexpr (kSums == 3) _tile_dpbf16ps(3, 4, 6);
  if constexpr (kTwo && kSums == 0) _tile_dpbf16ps(1, 4, 7);
  if constexpr (kTwo && kSums == 2) _tile_dpbf16ps(3, 4, 7);
  compiled_in_order();
}

// sums [V][16][width] of the first `rows` of 16 rows of the weight by V groups of x. False as in dot_tile.
template <int V>
__attribute__((noinline)) bool streamed_tile(const Problem<bf16>& p, const uint32_t* pairs, int64_t width, int64_t row,
                                             int rows, float sums[4 * kTile * kTile]) {
  if (!are_within(kTableRange<bf16>, p.scales_of(row), rows * (p.k / kBlock))) return false;
  alignas(64) StepPanel panels[2] = {};
  const int64_t group = packed_columns(p.k) / 2 * width, steps = packed_columns(p.k) / kStep;
  Decoder decode;
  auto decode_quarter = [&](int64_t step, int quarter) {
    if (step == steps) return;
    const int64_t column = step * kStep, ahead = ahead_of<kStreamAhead>(column, p.k, rows);
    const int first = quarter * kQuarter, count = std::min(rows - first, kQuarter);
    const uint8_t *codes = p.codes_of(row + first) + column, *scales = p.scales_of(row + first) + column / kBlock;
    StepPanel& panel = panels[step % 2];
    decode_rows(codes, scales, p.k, count, p.k - column < kStep, ahead, decode, panel[0] + first * kTileColumns, kTileColumns,
                kTileSize);
  };
  compiled_in_order();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int quarter = 0; quarter < 4; quarter++) decode_quarter(0, quarter);
  for (int64_t step = 0; step < steps; step++) {
    const StepPanel& panel = panels[step % 2];
    const uint32_t* x = pairs + step * (kStep / 2 * width);
    decode_quarter(step + 1, 0);
    multiply_quarter<V, 0>(panel, x, width, group);
    decode_quarter(step + 1, 1);
    multiply_quarter<V, 1>(panel, x, width, group);
    decode_quarter(step + 1, 2);
    multiply_quarter<V, 2>(panel, x, width, group);
    decode_quarter(step + 1, 3);
    multiply_quarter<V, 3>(panel, x, width, group);
  }
  const int64_t size = kTile * width, stride = width * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + size, stride);
  _tile_stored(2, sums + 2 * size, stride);
  _tile_stored(3, sums + 3 * size, stride);
  compiled_in_order();
  for (int64_t i = 0; V <= 2 && i < 2 * size; i++) sums[i] += sums[2 * size + i];
  return !decode.seen_nan();
}

}  // namespace

#endif
