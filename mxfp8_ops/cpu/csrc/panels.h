// Level "amx_bf16", more rows of x: panels of the weight, each multiplied by all of x. While the matrix unit works on one panel
// the next is decoded, a piece at a time between the instructions.
#pragma once

#include "tiles.h"

#if MXFP8_LEVEL >= 4

namespace {

constexpr int kTileRows = 2 * kTile;  // rows of a panel
constexpr int kPanelColumns = 1024;
constexpr int kPieceRows = 8;         // read side by side: more would leave the L1 cache where rows are a multiple of 4 KiB apart
constexpr int kTogether = 8;          // panels for which a part of x stays in the L2 cache
constexpr int64_t kMostRows = 256;    // of x, multiplied by the whole weight before the next

using TilePair = bf16[2][kTileSize];  // 32 columns of 32 rows

struct alignas(64) Panel {
  TilePair steps[kPanelColumns / kTileColumns];
};

// A panel in the making.
class Decoding {
 public:
  // From a column of the first of some rows on; `next` is where the panel after it begins. keep_pace() will be called `pace`
  // times for each piece.
  Decoding(const Problem<bf16>& p, int64_t row, int64_t rows, int64_t column, const uint8_t* next, int64_t pace, Panel& to)
      : codes_(p.codes_of(row) + column), scales_(p.scales_of(row) + column / kBlock), next_(next), to_(to), k_(p.k),
        rows_(rows), columns_(std::min<int64_t>(p.k - column, kPanelColumns)), pace_(pace) {}
  Decoding(const Decoding&) = delete;
  Decoding& operator=(const Decoding&) = delete;

  void keep_pace() {
    if (++calls_ < pace_) return;
    calls_ = 0;
    if (row_ < rows_) piece();
  }
  void finish() {
    while (row_ < rows_) piece();
  }
  bool seen_nan() const { return decode_.seen_nan(); }

 private:
  // kStep columns of kPieceRows rows, or what is left of them. The rows below come next, and are asked for.
  void piece() {
    const uint8_t* codes = codes_ + row_ * k_ + column_;
    const uint8_t* scales = scales_ + row_ * (k_ / kBlock) + column_ / kBlock;
    const int64_t ahead = row_ + kPieceRows < rows_ ? kPieceRows * k_ : next_ - (codes_ + row_ * k_);
    bf16* tile = to_.steps[column_ / kTileColumns][row_ / kTile] + row_ % kTile * kTileColumns;
    const int64_t count = std::min<int64_t>(rows_ - row_, kPieceRows);
    decode_rows(codes, scales, k_, count, columns_ - column_ < kStep, ahead, decode_, tile, kTileColumns,
                sizeof(TilePair) / sizeof(bf16));
    column_ += kStep;
    if (column_ < columns_) return;
    column_ = 0;
    row_ += kPieceRows;
  }

  const uint8_t *codes_, *scales_, *next_;
  Panel& to_;
  const int64_t k_, rows_, columns_, pace_;
  int64_t row_ = 0, column_ = 0, calls_ = 0;
  Decoder decode_;
};

// sums [V][2][16][16] of a panel by V groups of x, added to what is there unless these are the first columns.
template <int V>
inline void multiply_panel(const Panel& panel, const uint32_t* pairs, int64_t group, int64_t columns, float* sums, bool first,
                           Decoding& next) {
  constexpr int64_t kSize = kTile * kTile, kStride = 64;
  compiled_in_order();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kStride);
    _tile_loadd(1, sums + kSize, kStride);
    if (V == 2) {
      _tile_loadd(2, sums + 2 * kSize, kStride);
      _tile_loadd(3, sums + 3 * kSize, kStride);
    }
  }
  for (int64_t step = 0; step < columns / kTileColumns; step++) {
    const uint32_t* x = pairs + step * (kTileColumns / 2 * kTile);
    _tile_loadd(6, x, kStride);
    _tile_loadd(4, panel.steps[step][0], kStride);
    _tile_dpbf16ps(0, 4, 6);
    if (V == 2) {
      _tile_loadd(7, x + group, kStride);
      _tile_dpbf16ps(2, 4, 7);
    }
    compiled_in_order();
    next.keep_pace();
    compiled_in_order();
    _tile_loadd(5, panel.steps[step][1], kStride);
    _tile_dpbf16ps(1, 5, 6);
    if (V == 2) _tile_dpbf16ps(3, 5, 7);
    compiled_in_order();
    next.keep_pace();
    compiled_in_order();
  }
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + kSize, kStride);
  if (V == 2) {
    _tile_stored(2, sums + 2 * kSize, kStride);
    _tile_stored(3, sums + 3 * kSize, kStride);
  }
  compiled_in_order();
}

// sums [panels][groups][2][16][16] of groups of x, pairs [groups][K/2][16][2], by rows [row, last) of the weight: at most
// kTogether panels, which take turns with each part of x. Where good[panel] is false, as from dot_tile, the sums are anything.
inline void multiply_panels(const Problem<bf16>& p, const uint32_t* pairs, int64_t groups, int64_t row, int64_t last, float* sums,
                            bool good[kTogether]) {
  static thread_local Buffer buffer;
  Panel* panels = buffer.at_least<Panel>(2);
  const int64_t count = (last - row + kTileRows - 1) / kTileRows, turns = (p.k + kPanelColumns - 1) / kPanelColumns * count;
  const int64_t group = packed_columns(p.k) / 2 * kTile, size = groups * 2 * kTile * kTile;
  auto row_of = [&](int64_t turn) { return row + turn % count * kTileRows; };
  auto column_of = [&](int64_t turn) { return turn / count * kPanelColumns; };
  auto rows_of = [&](int64_t turn) { return turn < turns ? std::min<int64_t>(last - row_of(turn), kTileRows) : 0; };
  auto decoding = [&](int64_t turn) {
    const uint8_t* next = turn + 1 < turns ? p.codes_of(row_of(turn + 1)) + column_of(turn + 1) : p.codes_of(last);
    return Decoding(p, row_of(turn), rows_of(turn), column_of(turn), next, (groups + 1) / 2, panels[turn % 2]);
  };
  for (int64_t i = 0; i < count; i++)
    good[i] = are_within(kTableRange<bf16>, p.scales_of(row_of(i)), rows_of(i) * (p.k / kBlock));
  {
    Decoding first = decoding(0);
    first.finish();
    good[0] = good[0] && !first.seen_nan();
  }
  for (int64_t turn = 0; turn < turns; turn++) {
    Decoding next = decoding(turn + 1);
    const int64_t column = column_of(turn), columns = packed_columns(std::min<int64_t>(p.k - column, kPanelColumns));
    const uint32_t* x = pairs + column / 2 * kTile;
    float* to = sums + turn % count * size;
    for (int64_t v = 0; v < groups; v += 2) {
      auto multiply = v + 2 <= groups ? multiply_panel<2> : multiply_panel<1>;
      multiply(panels[turn % 2], x + v * group, group, columns, to + v * 2 * kTile * kTile, column == 0, next);
    }
    next.finish();
    if (turn + 1 < turns) good[(turn + 1) % count] = good[(turn + 1) % count] && !next.seen_nan();
  }
}

}  // namespace

#endif
