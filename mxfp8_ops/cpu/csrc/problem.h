// What linear is asked for, and how its rows are shared among threads.
#pragma once

#include <cstdlib>

#include "format.h"

namespace {

// x [m, k] with rows `stride` elements apart, codes [n, k], scales [n, k/32], bias [n] or null, out [m, n].
template <class T>
struct Problem {
  const T* x;
  int64_t stride;
  const uint8_t* codes;
  const uint8_t* scales;
  const T* bias;
  T* out;
  int64_t m, n, k;
  int threads;

  const uint8_t* codes_of(int64_t row) const { return codes + row * k; }
  const uint8_t* scales_of(int64_t row) const { return scales + row * (k / kBlock); }
  void write(int64_t m_index, int64_t row, float sum) const {
    out[m_index * n + row] = rounded<T>(bias == nullptr ? sum : sum + to_float(bias[row]));
  }
};

// Memory that a thread keeps between calls, aligned to cache lines. What it held is lost when it grows.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  template <class U>
  U* at_least(int64_t count) {
    size_t bytes = (static_cast<size_t>(count) * sizeof(U) + 63) / 64 * 64;
    if (bytes > bytes_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      bytes_ = data_ == nullptr ? 0 : bytes;
      if (data_ == nullptr) std::abort();
    }
    return static_cast<U*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Threads worth waking: each should have at least some ten microseconds of work.
inline int threads_for(int64_t work, int threads) {
  constexpr int64_t kEnough = 1 << 17;  // bytes of weights, times rows of x
  int64_t most = 1 + work / kEnough;
  return most < threads ? static_cast<int>(most) : threads;
}

// Rows of a weight in one portion of work: some 250 kB, a multiple of a tile's rows, less where threads would idle.
inline int64_t portion(int64_t n, int64_t k, int threads, int64_t tile) {
  constexpr int64_t kBytes = 256 * 1024;
  int64_t rows = tile * (1 + kBytes / (tile * k + 1));
  int64_t fair = (n + threads - 1) / threads;
  return rows < fair ? rows : fair;
}

constexpr int64_t kAnyTile = 24;  // a multiple of the rows of all tiles but those of tiles.h

// f(first, last) on portions of n rows, in threads.
template <class F>
void in_portions(int64_t n, int64_t k, int threads, int64_t tile, F f) {
  if (n == 0) return;
  int64_t rows = portion(n, k, threads, tile), portions = (n + rows - 1) / rows;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t i = 0; i < portions; i++) f(i * rows, (i + 1) * rows < n ? (i + 1) * rows : n);
}

}  // namespace
