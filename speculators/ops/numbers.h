// Number formats and sums that the kernels share.
//
// Matrices are contiguous; the short format is bfloat16, the upper half of a float; arithmetic is float32. Results
// depend neither on the number of threads nor on memory addresses: a sum belongs to one thread and has a fixed number
// of lanes, and `multiply_add` fixes which product is fused with which sum.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

using Short = uint16_t;

inline float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t as_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

inline float to_float(float x) { return x; }
inline float to_float(Short x) { return as_float(uint32_t(x) << 16); }

inline void assign(float& to, float x) { to = x; }
// Rounds to nearest, ties to even.
inline void assign(Short& to, float x) {
  const uint32_t bits = as_bits(x);
  to = Short((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// a * b + c, rounded once where the processor has an instruction for it.
inline float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

constexpr int64_t LANES = 16;

// Sum of term(0) to term(count - 1).
template <class F>
inline float sum_of(int64_t count, F term) {
  float lanes[LANES] = {};
  int64_t j = 0;
  for (; j + LANES <= count; j += LANES)
    for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += term(j + lane);
  for (int64_t lane = 0; j + lane < count; ++lane) lanes[lane] += term(j + lane);
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

// e^x for x <= 0, with a relative error of about 1e-7; x is clamped to -87, where a float's range ends. It is 2^n * e^r
// with |r| <= log(2) / 2; e^r is a Taylor series whose last terms are fitted to that interval.
inline float exponential(float x) {
  constexpr float LOG2_E = 1.44269504f, ROUNDS = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float LOG_2 = 0.693359375f, LOG_2_REST = -2.12194440e-4f;
  x = x < -87.0f ? -87.0f : x;  // NaN stays NaN
  const float rounded = multiply_add(x, LOG2_E, ROUNDS), n = rounded - ROUNDS;
  const float r = multiply_add(-n, LOG_2_REST, multiply_add(-n, LOG_2, x));
  float y = 1.9875691500e-4f;
  y = multiply_add(y, r, 1.3981999507e-3f);
  y = multiply_add(y, r, 8.3334519073e-3f);
  y = multiply_add(y, r, 4.1665795894e-2f);
  y = multiply_add(y, r, 1.6666665459e-1f);
  y = multiply_add(y, r, 5.0000001201e-1f);
  y = multiply_add(y * r, r, r) + 1.0f;
  return y * as_float((as_bits(rounded) + 127u) << 23);
}

template <class T>
float max_of(const T* row, int64_t width) {
  float top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < width; ++j) top = std::max(top, to_float(row[j]));
  return top;
}

// Sets q = e^(row - top) and returns its sum.
template <class T>
float exponentials(const T* row, float top, float* q, int64_t width) {
  return sum_of(width, [&](int64_t j) { return q[j] = exponential(to_float(row[j]) - top); });
}

}  // namespace
