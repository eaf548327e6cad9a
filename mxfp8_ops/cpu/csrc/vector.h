// float32 vectors, and how 32 codes become such vectors: one header a level, all with the same names.
//
//   vec, kWidth                 a vector and its elements
//   zero, set, load, store      load and store also convert from and to bf16 and f16 (rounding to nearest even)
//   stream, fence               store past the caches
//   add, mul, fma, sum          fma(a, b, c) = a * b + c
//   decode(codes, out)          32 elements in order, times 2^-kDecodeExponent, exact but for NaN
//   encode(in, factor, codes)   the codes of 32 values times factor, which leaves out 2^-kEncodeExponent
//   largest_bits(in)            the largest of 32 magnitudes, as which their bits are ordered
//   any_nan(codes)              whether one of 32 codes is NaN
#pragma once

#ifndef MXFP8_LEVEL
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define MXFP8_LEVEL 4
#elif defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define MXFP8_LEVEL 3
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define MXFP8_LEVEL 2
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MXFP8_LEVEL 1
#else
#define MXFP8_LEVEL 0
#endif
#endif

#include "format.h"

#if MXFP8_LEVEL >= 2
#include "vector_avx512.h"
#elif MXFP8_LEVEL == 1
#include "vector_avx2.h"
#else
#include "vector_generic.h"
#endif

namespace {

constexpr int kVectors = kBlock / kWidth;  // of one block

}  // namespace
