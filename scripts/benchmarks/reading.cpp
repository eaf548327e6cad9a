// R on the CPU: reads memory, and does next to nothing with it.
#include <cstdint>

extern "C" int mxfp8_abi(void) { return 0; }

// The sum of `count` words, read by every thread as `streams` sequences, each through a part of its own.
extern "C" int64_t read_words(const int64_t* words, int64_t count, int streams, int threads) {
  int64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
  for (int64_t thread = 0; thread < threads; ++thread) {
    const int64_t first = count * thread / threads, length = count * (thread + 1) / threads - first;
    const int64_t part = length / streams;
    const int64_t* at = words + first;
    int64_t sums[8] = {0};
    if (streams == 1) {
      for (int64_t i = 0; i < length; ++i) sums[0] += at[i];
    } else {
      for (int64_t i = 0; i + 8 <= part; i += 8)
        for (int stream = 0; stream < streams; ++stream)
          for (int j = 0; j < 8; ++j) sums[j] += at[stream * part + i + j];
    }
    for (int64_t sum : sums) total += sum;
  }
  return total;
}
