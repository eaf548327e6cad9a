// The C ABI of the CPU kernels: the one source file, compiled once a level. Arguments are checked already; pointers may
// be unaligned, nothing is read past the last byte of any input, and several threads may call at once.
//
// dtype: 0 float32, 1 bfloat16, 2 float16, and for dequant 3 and 4, the values of 1 and 2 as float32. rule: 0 floor, 1
// rceil. Sizes in elements.
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
MXFP8_EXPORT int mxfp8_abi(void) { return 3; }

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
