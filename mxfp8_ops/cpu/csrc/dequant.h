// dequant: e4m3(code) * 2^(scale - 127), exact in float32, rounded once.
#pragma once

#include <type_traits>

#include "block.h"
#include "problem.h"
#include "tables.h"

namespace {

// Results beyond this size are written past the caches, which would be full of them before anybody reads one.
constexpr int64_t kStreamBytes = 8 << 20;

template <bool kStream, class T>
inline void put(T* to, vec a) {
  if constexpr (kStream) {
    stream(to, a);
  } else {
    store(to, a);
  }
}

// Values are rounded to V first, unless that is float32.
template <bool kStream, class V, class T>
void dequant_range(const uint8_t* codes, const uint8_t* scales, T* out, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; block++) {
    vec values[kVectors];
    dequant_block<V>(codes + block * kBlock, scales[block], values);
    for (int i = 0; i < kVectors; i++) put<kStream>(out + block * kBlock + i * kWidth, values[i]);
  }
}

#if MXFP8_LEVEL >= 3

// Words with the signs of their codes: those of zeros, which Decoder drops.
inline __m512i with_signs(__m512i words, __m512i codes_above) {
  return _mm512_ternarylogic_epi32(words, codes_above, _mm512_set1_epi16(INT16_MIN), 0xf8);  // words | (codes & 0x8000)
}

// Two blocks at a time by tables. Pieces of eight codes are put where unpacking leaves them in order.
template <bool kStream>
void dequant_by_tables(const uint8_t* codes, const uint8_t* scales, bf16* out, int64_t first, int64_t last) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  Decoder decode;
  int64_t block = first;
  for (; block + 2 <= last; block += 2) {
    __m512i words[2], minus[2];
    for (int i = 0; i < 2; i++) minus[i] = _mm512_set1_epi32(static_cast<int>(kTables.minus[scales[block + i]]));
    decode.seen = _mm512_setzero_si512();
    __m512i both = _mm512_permutexvar_epi64(order, load_codes(codes + block * kBlock));
    decode(both, minus[0], minus[1], words[0], words[1]);
    words[0] = with_signs(words[0], _mm512_unpacklo_epi8(both, both));
    words[1] = with_signs(words[1], _mm512_unpackhi_epi8(both, both));
    bool fast = are_within(kTableRange<bf16>, scales + block, 2) && !decode.seen_nan();
    if (__builtin_expect(!fast, false)) {
      dequant_range<kStream, f32>(codes, scales, out, block, block + 2);
      continue;
    }
    for (int i = 0; i < 2; i++) {
      bf16* to = out + (block + i) * kBlock;
      if constexpr (kStream) {
        _mm512_stream_si512(as<__m512i>(to), words[i]);
      } else {
        _mm512_storeu_si512(to, words[i]);
      }
    }
  }
  dequant_range<kStream, f32>(codes, scales, out, block, last);
}

#endif

template <bool kStream, class V, class T>
void dequant_some(const uint8_t* codes, const uint8_t* scales, T* out, int64_t first, int64_t last) {
#if MXFP8_LEVEL >= 3
  if constexpr (std::is_same_v<T, bf16>) return dequant_by_tables<kStream>(codes, scales, out, first, last);
#endif
  dequant_range<kStream, V>(codes, scales, out, first, last);
}

template <class V, class T>
void dequant(const uint8_t* codes, const uint8_t* scales, T* out, int64_t blocks, int threads) {
  int64_t bytes = blocks * kBlock * static_cast<int64_t>(sizeof(T));
  bool streams = bytes >= kStreamBytes && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  in_portions(blocks, kBlock, threads_for(blocks * kBlock, threads), kAnyTile, [&](int64_t first, int64_t last) {
    if (streams) {
      dequant_some<true, V>(codes, scales, out, first, last);
      fence();
    } else {
      dequant_some<false, V>(codes, scales, out, first, last);
    }
  });
}

}  // namespace
