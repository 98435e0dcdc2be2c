// Loops of a training step for which torch goes through memory once for every operation; see __init__.py.

#include <type_traits>
#include <vector>

#include "numbers.h"

namespace {

// That a sum over a whole tensor is made of, and those over columns.
constexpr int64_t PARTS = 256, BANDS = 32;

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

template <class X, class Y>
void norm(const X* x, const float* weight, Y* y, float* inverse, int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) {
    const X* const from = x + i * width;
    Y* const to = y + i * width;
    const float squares = total(width, [=](int64_t j) { return wide(from[j]) * wide(from[j]); });
    const float times = 1.0f / std::sqrt(squares / float(width) + eps);
    inverse[i] = times;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) put(to[j], wide(from[j]) * times * weight[j]);
  }
}

template <class S, class X>
void norm_slopes(const S* slope, const X* x, const float* weight, const float* inverse, X* of_x, float* of_weight,
                 int64_t rows, int64_t width, int threads) {
  std::vector<float> all(BANDS * width);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t band = 0; band < BANDS; ++band) {
    float* const sums = all.data() + band * width;
    for (int64_t i = rows * band / BANDS; i < rows * (band + 1) / BANDS; ++i) {
      const X* const at = x + i * width;
      const S* const s = slope + i * width;
      X* const to = of_x + i * width;
      const float times = inverse[i];
      const float along = total(width, [=](int64_t j) { return wide(s[j]) * weight[j] * wide(at[j]); });
      const float back = along * times * times / float(width);
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        const float from = wide(s[j]), was = wide(at[j]);
        put(to[j], times * fused(-back, was, from * weight[j]));
        sums[j] = fused(from, was * times, sums[j]);
      }
    }
  }
  for (int64_t j = 0; j < width; ++j) {
    of_weight[j] = 0;
    for (int64_t band = 0; band < BANDS; ++band) of_weight[j] += all[band * width + j];
  }
}

inline float sigmoid(float x) {
  const float e = exponential(-std::fabs(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

template <class T>
void gated(const T* gate, const T* up, T* out, int64_t count, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
  for (int64_t j = 0; j < count; ++j) put(out[j], wide(gate[j]) * sigmoid(wide(gate[j])) * wide(up[j]));
}

template <class T>
void gated_slopes(const T* slope, const T* gate, const T* up, T* of_gate, T* of_up, int64_t count, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
  for (int64_t j = 0; j < count; ++j) {
    const float g = wide(gate[j]), open = sigmoid(g), through = g * open, s = wide(slope[j]);
    put(of_up[j], s * through);
    put(of_gate[j], s * wide(up[j]) * fused(through, 1.0f - open, open));
  }
}

template <class X, class Y>
void rotate(const X* x, const float* cosine, const float* sine, Y* y, int64_t rows, int64_t heads, int64_t width,
            int threads) {
  const int64_t half = width / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows * heads; ++i) {
    const float* const c = cosine + i / heads * width;
    const float* const s = sine + i / heads * width;
    const X* const from = x + i * width;
    Y* const to = y + i * width;
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
      const float first = wide(from[j]), second = wide(from[j + half]);
      put(to[j], fused(first, c[j], -second * s[j]));
      put(to[j + half], fused(second, c[j], first * s[j]));
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
void move(float* weight, Short* rounded, const U* update, int64_t count, float keep, float size, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
  for (int64_t j = 0; j < count; ++j) {
    const float moved = fused(weight[j], keep, -size * wide(update[j]));
    weight[j] = moved;
    if (rounded) put(rounded[j], moved);
  }
}

template <class T>
void squares(const T* x, int64_t count, double* sums, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t part = 0; part < PARTS; ++part) {
    const int64_t begin = count * part / PARTS, end = count * (part + 1) / PARTS;
    sums[part] = total(end - begin, [=](int64_t j) { return wide(x[begin + j]) * wide(x[begin + j]); });
  }
}

// Call with a pointer to what it points to.
template <class F>
void either(const void* x, int is_short, F call) {
  if (is_short) call(static_cast<const Short*>(x));
  else call(static_cast<const float*>(x));
}

template <class F>
void either(void* x, int is_short, F call) {
  if (is_short) call(static_cast<Short*>(x));
  else call(static_cast<float*>(x));
}

}  // namespace

// Whether a matrix of any format is of the short one is said behind it.
extern "C" {

void speculators_losses(int cross_entropy, void* z, int z_short, const void* wanted, int wanted_short,
                        const int64_t* local, const float* weight, int64_t n, int64_t width, int slopes, float* loss,
                        uint8_t* correct, int threads) {
  either(z, z_short, [&](auto* own) {
    either(wanted, wanted_short, [&](const auto* other) {
      losses(cross_entropy != 0, own, other, local, weight, n, width, slopes != 0, loss, correct, threads);
    });
  });
}

void speculators_norm(const void* x, int x_short, const float* weight, void* y, int y_short, float* inverse,
                      int64_t rows, int64_t width, float eps, int threads) {
  either(x, x_short, [&](const auto* from) {
    either(y, y_short, [&](auto* to) { norm(from, weight, to, inverse, rows, width, eps, threads); });
  });
}

void speculators_norm_slopes(const void* slope, int slope_short, const void* x, int x_short, const float* weight,
                             const float* inverse, void* of_x, float* of_weight, int64_t rows, int64_t width,
                             int threads) {
  either(slope, slope_short, [&](const auto* s) {
    either(of_x, x_short, [&](auto* to) {
      using Own = const std::remove_pointer_t<decltype(to)>*;
      norm_slopes(s, static_cast<Own>(x), weight, inverse, to, of_weight, rows, width, threads);
    });
  });
}

void speculators_gated(const void* gate, const void* up, void* out, int all_short, int64_t count, int threads) {
  either(out, all_short, [&](auto* to) {
    using Own = const std::remove_pointer_t<decltype(to)>*;
    gated(static_cast<Own>(gate), static_cast<Own>(up), to, count, threads);
  });
}

void speculators_gated_slopes(const void* slope, const void* gate, const void* up, void* of_gate, void* of_up,
                              int all_short, int64_t count, int threads) {
  either(of_gate, all_short, [&](auto* to) {
    using Own = std::remove_pointer_t<decltype(to)>;
    gated_slopes(static_cast<const Own*>(slope), static_cast<const Own*>(gate), static_cast<const Own*>(up), to,
                 static_cast<Own*>(of_up), count, threads);
  });
}

void speculators_rotate(const void* x, int x_short, const float* cosine, const float* sine, void* y, int y_short,
                        int64_t rows, int64_t heads, int64_t width, int threads) {
  either(x, x_short, [&](const auto* from) {
    either(y, y_short, [&](auto* to) { rotate(from, cosine, sine, to, rows, heads, width, threads); });
  });
}

void speculators_momentum(float* held, const void* gradient, int gradient_short, void* asked, int asked_short,
                          int64_t rows, int64_t width, int turned, float keep, float fresh, float ahead, int threads) {
  either(gradient, gradient_short, [&](const auto* from) {
    either(asked, asked_short, [&](auto* to) {
      momentum(held, from, to, rows, width, turned != 0, keep, fresh, ahead, threads);
    });
  });
}

void speculators_polynomial(Short* x, const Short* square, const float* factors, int64_t count, int64_t width,
                            int threads) {
  polynomial(x, square, factors, count, width, threads);
}

void speculators_move(float* weight, Short* rounded, const void* update, int update_short, int64_t count, float keep,
                      float size, int threads) {
  either(update, update_short, [&](const auto* by) { move(weight, rounded, by, count, keep, size, threads); });
}

double speculators_squares(const void* x, int x_short, int64_t count, int threads) {
  double sums[PARTS], all = 0;
  either(x, x_short, [&](const auto* from) { squares(from, count, sums, threads); });
  for (const double sum : sums) all += sum;
  return all;
}
}
