// Loops of a training step for which torch goes through memory once for every operation; see __init__.py.
//
// Matrices are contiguous, numbers of the short format are bfloat16, which is the upper half of a float, and all is
// computed in float32. The results depend neither on the number of threads nor on where in memory the numbers are: a row
// is one thread's, sums are made in lanes of a fixed number, and products are fused with sums where it says so alone.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

using Short = uint16_t;

// That a sum over a whole tensor is made of.
constexpr int64_t PARTS = 256;

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

// The first place of a value in a row, or its width.
template <class T>
int64_t place_of(float value, const T* row, int64_t width) {
  constexpr int64_t STRIDE = 256;
  for (int64_t begin = 0; begin < width; begin += STRIDE) {
    const int64_t end = std::min(begin + STRIDE, width);
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t j = begin; j < end; ++j) found |= wide(row[j]) == value;
    if (!found) continue;
    for (int64_t j = begin; j < end; ++j)
      if (wide(row[j]) == value) return j;
  }
  return width;
}

// q = e^(row - top); returns the sum.
template <class T>
float powers(const T* row, float top, float* q, int64_t width) {
  return total(width, [&](int64_t j) { return q[j] = exponential(wide(row[j]) - top); });
}

template <class Z, class W>
void losses(bool cross_entropy, Z* z, const W* wanted, const int64_t* local, const float* weight, int64_t n,
            int64_t width, bool slopes, float* loss, uint8_t* correct, int threads) {
#pragma omp parallel num_threads(threads)
  {
    // Of the target's row that was met last: its probabilities, the logarithm of their divisor, its most likely token.
    std::vector<float> target(cross_entropy ? 0 : width), draft(width);
    float* const p = target.data();
    float* const q = draft.data();
    float normaliser = 0;
    int64_t at = -1, label = 0;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < n; ++i) {
      const W* const w = wanted + local[i] * width;
      if (local[i] != at) {
        at = local[i];
        const float top = largest(w, width);
        label = place_of(top, w, width);
        if (cross_entropy) {
          // That of the rest would hide what is no number.
          if (total(width, [&](int64_t j) { return wide(w[j]) * 0.0f; }) != 0) label = width;
        } else {
          const float sum = powers(w, top, p, width), share = 1.0f / sum;
          normaliser = top + std::log(sum);
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) p[j] *= share;
        }
      }
      Z* const row = z + i * width;
      const float top = largest(row, width), times = weight ? weight[i] : 1.0f;
      const float said = label < width ? wide(row[label]) : NAN;
      correct[i] = said == top && place_of(top, row, label) == label;
      const float sum = powers(row, top, q, width), share = times / sum;
      loss[i] = top + std::log(sum);
      if (cross_entropy) {
        loss[i] -= said;
        if (!slopes) continue;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) put(row[j], q[j] * share);
        if (label < width) put(row[label], fused(q[label], share, -times));
      } else {
        loss[i] += total(width, [&](int64_t j) { return p[j] * (wide(w[j]) - wide(row[j])); }) - normaliser;
        if (!slopes) continue;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) put(row[j], fused(q[j], share, -p[j] * times));
      }
    }
  }
}

template <class G, class A>
void momentum(float* held, const G* gradient, A* asked, int64_t rows, int64_t width, bool turned, float keep,
              float fresh, float ahead, int threads) {
  constexpr int64_t TILE = 32;
  const int64_t bands = (rows + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t band = 0; band < bands; ++band) {
    const int64_t begin = band * TILE, end = std::min(begin + TILE, rows), step = turned ? TILE : width;
    for (int64_t first = 0; first < width; first += step) {
      const int64_t last = std::min(first + step, width);
      A tile[TILE * TILE];
      for (int64_t i = begin; i < end; ++i) {
        float* const m = held + i * width + first;
        const G* const g = gradient + i * width + first;
        A* const to = turned ? tile + (i - begin) * TILE : asked + i * width;
#pragma omp simd
        for (int64_t j = 0; j < last - first; ++j) {
          const float x = wide(g[j]), moved = fused(m[j], keep, x * fresh);
          m[j] = moved;
          if (asked) put(to[j], fused(x, ahead, moved));
        }
      }
      for (int64_t j = first; turned && asked && j < last; ++j)
        for (int64_t i = begin; i < end; ++i) asked[j * rows + i] = tile[(i - begin) * TILE + j - first];
    }
  }
}

void polynomial(Short* x, const Short* square, const float* factors, int64_t count, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < count * width; ++row) {
    const float* const f = factors + 3 * (row / width);
    Short* const g = x + row * width;
    const Short* const s = square + row * width;
    const int64_t diagonal = row % width;
    const float own = f[0] + fused(f[1], wide(g[diagonal]), f[2] * wide(s[diagonal]));
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) put(g[j], fused(f[1], wide(g[j]), f[2] * wide(s[j])));
    put(g[diagonal], own);
  }
}

template <class U>
void move(float* weight, const U* update, int64_t count, float keep, float size, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
  for (int64_t j = 0; j < count; ++j) weight[j] = fused(weight[j], keep, -size * wide(update[j]));
}

template <class T>
void squares(const T* x, int64_t count, double* sums, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t part = 0; part < PARTS; ++part) {
    const int64_t begin = count * part / PARTS, end = count * (part + 1) / PARTS;
    sums[part] = total(end - begin, [=](int64_t j) { return wide(x[begin + j]) * wide(x[begin + j]); });
  }
}

}  // namespace

// Whether a matrix of any format is of the short one is said behind it.
extern "C" {

void speculators_losses(int cross_entropy, void* z, int z_short, const void* wanted, int wanted_short,
                        const int64_t* local, const float* weight, int64_t n, int64_t width, int slopes, float* loss,
                        uint8_t* correct, int threads) {
  const auto run = [&](auto* own, const auto* other) {
    losses(cross_entropy != 0, own, other, local, weight, n, width, slopes != 0, loss, correct, threads);
  };
  const auto against = [&](const auto* other) {
    if (z_short) run(static_cast<Short*>(z), other);
    else run(static_cast<float*>(z), other);
  };
  if (wanted_short) against(static_cast<const Short*>(wanted));
  else against(static_cast<const float*>(wanted));
}

void speculators_momentum(float* held, const void* gradient, int gradient_short, void* asked, int asked_short,
                          int64_t rows, int64_t width, int turned, float keep, float fresh, float ahead, int threads) {
  const auto run = [&](const auto* from, auto* to) {
    momentum(held, from, to, rows, width, turned != 0, keep, fresh, ahead, threads);
  };
  const auto towards = [&](auto* to) {
    if (gradient_short) run(static_cast<const Short*>(gradient), to);
    else run(static_cast<const float*>(gradient), to);
  };
  if (asked_short) towards(static_cast<Short*>(asked));
  else towards(static_cast<float*>(asked));
}

void speculators_polynomial(Short* x, const Short* square, const float* factors, int64_t count, int64_t width,
                            int threads) {
  polynomial(x, square, factors, count, width, threads);
}

void speculators_move(float* weight, const void* update, int update_short, int64_t count, float keep, float size,
                      int threads) {
  if (update_short) move(weight, static_cast<const Short*>(update), count, keep, size, threads);
  else move(weight, static_cast<const float*>(update), count, keep, size, threads);
}

double speculators_squares(const void* x, int x_short, int64_t count, int threads) {
  double sums[PARTS], total = 0;
  if (x_short) squares(static_cast<const Short*>(x), count, sums, threads);
  else squares(static_cast<const float*>(x), count, sums, threads);
  for (const double sum : sums) total += sum;
  return total;
}
}
