// The C ABI of the CPU kernels: the one source file, compiled once a level. Arguments are checked already; pointers may
// be unaligned, nothing is read past the last byte of any input, and several threads may call at once.
//
// dtype: 0 float32, 1 bfloat16, 2 float16, and for dequant 3 and 4, the values of 1 and 2 as float32. rule: 0 floor, 1
// rceil. Sizes in elements.
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "dequant.h"
#include "linear.h"
#include "quantize.h"

#define MXFP8_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// f(a value of the dtype's type)
template <class F>
void with_dtype(int dtype, F f) {
  if (dtype == 0) f(f32{});
  if (dtype == 1) f(bf16{});
  if (dtype == 2) f(f16{});
}

}  // namespace

// Raised with every change of a signature.
MXFP8_EXPORT int mxfp8_abi(void) { return 2; }

// For memory that is about to be written for the first time. It is mapped where it is first touched, 4 KiB at a time,
// which takes longer than all else. Linux maps 2 MiB at a time if it is asked to, and if it has them.
MXFP8_EXPORT void mxfp8_map_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // if not, it is slower
#else
  (void)memory, (void)bytes;
#endif
}

// out [blocks, 32] from codes [blocks, 32], scales [blocks].
MXFP8_EXPORT void mxfp8_dequant(const uint8_t* codes, const uint8_t* scales, void* out, int64_t blocks, int dtype,
                                int threads) {
  if (dtype == 3) return dequant<bf16>(codes, scales, static_cast<f32*>(out), blocks, threads);
  if (dtype == 4) return dequant<f16>(codes, scales, static_cast<f32*>(out), blocks, threads);
  with_dtype(dtype, [&](auto t) { dequant<f32>(codes, scales, static_cast<decltype(t)*>(out), blocks, threads); });
}

// codes [blocks, 32], scales [blocks] from x [blocks, 32].
MXFP8_EXPORT void mxfp8_quantize(const void* x, uint8_t* codes, uint8_t* scales, int64_t blocks, int dtype, int rule,
                                 int threads) {
  with_dtype(dtype, [&](auto t) { quantize(static_cast<const decltype(t)*>(x), codes, scales, blocks, rule, threads); });
}

// out [m, n] = x [m, k] . dequant(codes [n, k], scales [n, k/32]) + bias [n], which may be null; rows of x are x_row_stride
// elements apart. Returns 0.
MXFP8_EXPORT int mxfp8_linear(const void* x, int64_t x_row_stride, const uint8_t* codes, const uint8_t* scales,
                              const void* bias, void* out, int64_t m, int64_t n, int64_t k, int dtype, int threads) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    linear(Problem<T>{static_cast<const T*>(x), x_row_stride, codes, scales, static_cast<const T*>(bias),
                      static_cast<T*>(out), m, n, k, threads});
  });
  return 0;
}
