// Level "generic": 4 floats a vector, in the compiler's own vector types; GCC and Clang, any architecture.
#pragma once

#include "format.h"

namespace {

typedef float vec __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(16)));
typedef uint8_t bytes __attribute__((vector_size(4)));
constexpr int kWidth = 4;
constexpr int kDecodeExponent = 120;
constexpr int kEncodeExponent = 0;

inline vec zero() { return vec{0, 0, 0, 0}; }
inline vec set(float value) { return vec{value, value, value, value}; }
inline vec add(vec a, vec b) { return a + b; }
inline vec mul(vec a, vec b) { return a * b; }
inline vec fma(vec a, vec b, vec c) { return a * b + c; }  // fused where the compiler may and can
inline float sum(vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }

inline vec load(const f32* from) {
  vec a;
  std::memcpy(&a, from, sizeof a);
  return a;
}
template <class T>
inline vec load(const T* from) {
  return vec{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
}

inline void store(f32* to, vec a) { std::memcpy(to, &a, sizeof a); }
template <class T>
inline void store(T* to, vec a) {
  for (int i = 0; i < kWidth; i++) to[i] = rounded<T>(a[i]);
}

template <class T>
inline void stream(T* to, vec a) {
  store(to, a);
}
inline void fence() {}

// Exponent and mantissa moved to where float32 has them: see element_value.
inline void decode(const uint8_t* codes, vec out[8]) {
  for (int i = 0; i < 8; i++) {
    bytes four;
    std::memcpy(&four, codes + 4 * i, sizeof four);
    words wide = __builtin_convertvector(four, words);
    out[i] = reinterpret_cast<vec>((wide & 0x7f) << 20 | (wide & 0x80) << 24);
  }
}

inline void encode(const vec in[8], float factor, uint8_t* codes) {
  float values[kBlock];
  std::memcpy(values, in, sizeof values);
  for (int i = 0; i < kBlock; i++) codes[i] = code_of(values[i] * factor);
}

inline uint32_t largest_bits(const vec in[8]) {
  uint32_t bits[kBlock], largest = 0;
  std::memcpy(bits, in, sizeof bits);
  for (int i = 0; i < kBlock; i++) {
    uint32_t magnitude = bits[i] & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

inline bool any_nan(const uint8_t* codes) {
  uint64_t found = 0;
  for (int i = 0; i < kBlock; i += 8) {  // in a byte without its sign only 0x7f plus 1 reaches bit 7
    uint64_t eight;
    std::memcpy(&eight, codes + i, sizeof eight);
    found |= (eight & 0x7f7f7f7f7f7f7f7full) + 0x0101010101010101ull;
  }
  return (found & 0x8080808080808080ull) != 0;
}

}  // namespace
