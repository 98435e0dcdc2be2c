// Numbers, their two formats, and sums of them.
//
// Matrices are contiguous, numbers of the short format are bfloat16, which is the upper half of a float, and all is
// computed in float32. The results depend neither on the number of threads nor on where in memory the numbers are: what
// is added up is one thread's, in lanes of a fixed number, and where a product might be fused with either of two
// sums, it says with which.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

using Short = uint16_t;

inline float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t as_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

inline float wide(float x) { return x; }
inline float wide(Short x) { return as_float(uint32_t(x) << 16); }

inline void put(float& to, float x) { to = x; }
// To the nearest, ties to even.
inline void put(Short& to, float x) {
  const uint32_t bits = as_bits(x);
  to = Short((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// a * b + c; rounded once where the machine has an instruction for it.
inline float fused(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

constexpr int64_t LANES = 16;

// The sum of term(0) to term(count - 1).
template <class F>
inline float total(int64_t count, F term) {
  float lanes[LANES] = {};
  int64_t j = 0;
  for (; j + LANES <= count; j += LANES)
    for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += term(j + lane);
  for (int64_t lane = 0; j + lane < count; ++lane) lanes[lane] += term(j + lane);
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

// e^x for x <= 0, to about 1e-7 of itself; below -87, where a float ends, that of -87. It is 2^n * e^r with |r| at most
// log(2) / 2, and of e^r the Taylor series, whose last terms were fitted to that interval.
inline float exponential(float x) {
  constexpr float LOG2_E = 1.44269504f, ROUNDS = 12582912.0f;  // 1.5 * 2^23: no fraction is left beside it
  constexpr float LOG_2 = 0.693359375f, LOG_2_REST = -2.12194440e-4f;
  x = x < -87.0f ? -87.0f : x;  // what is no number stays none
  const float rounded = fused(x, LOG2_E, ROUNDS), n = rounded - ROUNDS;
  const float r = fused(-n, LOG_2_REST, fused(-n, LOG_2, x));
  float y = 1.9875691500e-4f;
  y = fused(y, r, 1.3981999507e-3f);
  y = fused(y, r, 8.3334519073e-3f);
  y = fused(y, r, 4.1665795894e-2f);
  y = fused(y, r, 1.6666665459e-1f);
  y = fused(y, r, 5.0000001201e-1f);
  y = fused(y * r, r, r) + 1.0f;
  return y * as_float((as_bits(rounded) + 127u) << 23);
}

template <class T>
float largest(const T* row, int64_t width) {
  float top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < width; ++j) top = std::max(top, wide(row[j]));
  return top;
}

// q = e^(row - top); returns the sum.
template <class T>
float powers(const T* row, float top, float* q, int64_t width) {
  return total(width, [&](int64_t j) { return q[j] = exponential(wide(row[j]) - top); });
}

}  // namespace
