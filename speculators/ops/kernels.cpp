// Kernels of a training step on a CPU. Each reads and writes memory once, where torch does so for every operation.

#include <type_traits>
#include <vector>

#include "numbers.h"

namespace {

// Partial sums of a sum over a whole tensor, and of sums over columns.
constexpr int64_t PARTS = 256, BANDS = 32;

// First index of a value in a row, or the row's width.
template <class T>
int64_t index_of(float value, const T* row, int64_t width) {
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
void losses(bool cross_entropy, Z* z, const W* target, const int64_t* local, const float* weight, int64_t n,
            int64_t width, bool with_grad, float* loss, uint8_t* correct, int threads) {
#pragma omp parallel num_threads(threads)
  {
    // Of the probabilities's row that was met last: its probabilities, the logarithm of their divisor, its most likely token.
    std::vector<float> probabilities(cross_entropy ? 0 : width), draft(width);
    float* const p = probabilities.data();
    float* const q = draft.data();
    float normaliser = 0;
    int64_t at = -1, label = 0;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < n; ++i) {
      const W* const w = target + local[i] * width;
      if (local[i] != at) {
        at = local[i];
        const float top = largest(w, width);
        label = index_of(top, w, width);
        if (cross_entropy) {
          // A label alone would hide that other logits are not numbers.
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
      const float label_logit = label < width ? wide(row[label]) : NAN;
      correct[i] = label_logit == top && index_of(top, row, label) == label;
      const float sum = powers(row, top, q, width), share = times / sum;
      loss[i] = top + std::log(sum);
      if (cross_entropy) {
        loss[i] -= label_logit;
        if (!with_grad) continue;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) put(row[j], q[j] * share);
        if (label < width) put(row[label], fused(q[label], share, -times));
      } else {
        loss[i] += total(width, [&](int64_t j) { return p[j] * (wide(w[j]) - wide(row[j])); }) - normaliser;
        if (!with_grad) continue;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) put(row[j], fused(q[j], share, -p[j] * times));
      }
    }
  }
}

template <class X, class Y>
void rms_norm(const X* x, const float* weight, Y* y, float* inverse, int64_t rows, int64_t width, float eps, int threads) {
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
void rms_norm_backward(const S* grad, const X* x, const float* weight, const float* inverse, X* grad_x, float* grad_weight,
                 int64_t rows, int64_t width, int threads) {
  std::vector<float> all(BANDS * width);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t band = 0; band < BANDS; ++band) {
    float* const sums = all.data() + band * width;
    for (int64_t i = rows * band / BANDS; i < rows * (band + 1) / BANDS; ++i) {
      const X* const at = x + i * width;
      const S* const s = grad + i * width;
      X* const to = grad_x + i * width;
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
    grad_weight[j] = 0;
    for (int64_t band = 0; band < BANDS; ++band) grad_weight[j] += all[band * width + j];
  }
}

inline float sigmoid(float x) {
  const float e = exponential(-std::fabs(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

template <class T>
void silu_mul(const T* gate, const T* up, T* out, int64_t count, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
  for (int64_t j = 0; j < count; ++j) put(out[j], wide(gate[j]) * sigmoid(wide(gate[j])) * wide(up[j]));
}

template <class T>
void silu_mul_backward(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t count, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
  for (int64_t j = 0; j < count; ++j) {
    const float g = wide(gate[j]), open = sigmoid(g), through = g * open, s = wide(grad[j]);
    put(grad_up[j], s * through);
    put(grad_gate[j], s * wide(up[j]) * fused(through, 1.0f - open, open));
  }
}

template <class X, class Y>
void apply_rotary(const X* x, const float* cos, const float* sin, Y* y, int64_t rows, int64_t heads, int64_t width,
            int threads) {
  const int64_t half = width / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows * heads; ++i) {
    const float* const c = cos + i / heads * width;
    const float* const s = sin + i / heads * width;
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
void nesterov_momentum(float* momentum, const G* grad, A* direction, int64_t rows, int64_t width, bool transposed, float keep,
              float fresh, float ahead, int threads) {
  constexpr int64_t TILE = 32;
  const int64_t bands = (rows + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t band = 0; band < bands; ++band) {
    const int64_t begin = band * TILE, end = std::min(begin + TILE, rows), step = transposed ? TILE : width;
    for (int64_t first = 0; first < width; first += step) {
      const int64_t last = std::min(first + step, width);
      A tile[TILE * TILE];
      for (int64_t i = begin; i < end; ++i) {
        float* const m = momentum + i * width + first;
        const G* const g = grad + i * width + first;
        A* const to = transposed ? tile + (i - begin) * TILE : direction + i * width;
#pragma omp simd
        for (int64_t j = 0; j < last - first; ++j) {
          const float x = wide(g[j]), moved = fused(m[j], keep, x * fresh);
          m[j] = moved;
          if (direction) put(to[j], fused(x, ahead, moved));
        }
      }
      for (int64_t j = first; transposed && direction && j < last; ++j)
        for (int64_t i = begin; i < end; ++i) direction[j * rows + i] = tile[(i - begin) * TILE + j - first];
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
void apply_update(float* weight, Short* rounded, const U* update, int64_t count, float keep, float size, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
  for (int64_t j = 0; j < count; ++j) {
    const float moved = fused(weight[j], keep, -size * wide(update[j]));
    weight[j] = moved;
    if (rounded) put(rounded[j], moved);
  }
}

template <class T>
void sum_of_squares(const T* x, int64_t count, double* sums, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t part = 0; part < PARTS; ++part) {
    const int64_t begin = count * part / PARTS, end = count * (part + 1) / PARTS;
    sums[part] = total(end - begin, [=](int64_t j) { return wide(x[begin + j]) * wide(x[begin + j]); });
  }
}

// Call with a pointer of the type that the flag names.
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

// Whether a matrix of any format is of the short one is label_logit behind it.
extern "C" {

void speculators_losses(int cross_entropy, void* z, int z_short, const void* target, int target_short,
                        const int64_t* local, const float* weight, int64_t n, int64_t width, int with_grad, float* loss,
                        uint8_t* correct, int threads) {
  either(z, z_short, [&](auto* own) {
    either(target, target_short, [&](const auto* other) {
      losses(cross_entropy != 0, own, other, local, weight, n, width, with_grad != 0, loss, correct, threads);
    });
  });
}

void speculators_rms_norm(const void* x, int x_short, const float* weight, void* y, int y_short, float* inverse,
                      int64_t rows, int64_t width, float eps, int threads) {
  either(x, x_short, [&](const auto* from) {
    either(y, y_short, [&](auto* to) { rms_norm(from, weight, to, inverse, rows, width, eps, threads); });
  });
}

void speculators_rms_norm_backward(const void* grad, int grad_short, const void* x, int x_short, const float* weight,
                             const float* inverse, void* grad_x, float* grad_weight, int64_t rows, int64_t width,
                             int threads) {
  either(grad, grad_short, [&](const auto* s) {
    either(grad_x, x_short, [&](auto* to) {
      using Own = const std::remove_pointer_t<decltype(to)>*;
      rms_norm_backward(s, static_cast<Own>(x), weight, inverse, to, grad_weight, rows, width, threads);
    });
  });
}

void speculators_silu_mul(const void* gate, const void* up, void* out, int all_short, int64_t count, int threads) {
  either(out, all_short, [&](auto* to) {
    using Own = const std::remove_pointer_t<decltype(to)>*;
    silu_mul(static_cast<Own>(gate), static_cast<Own>(up), to, count, threads);
  });
}

void speculators_silu_mul_backward(const void* grad, const void* gate, const void* up, void* grad_gate, void* grad_up,
                              int all_short, int64_t count, int threads) {
  either(grad_gate, all_short, [&](auto* to) {
    using Own = std::remove_pointer_t<decltype(to)>;
    silu_mul_backward(static_cast<const Own*>(grad), static_cast<const Own*>(gate), static_cast<const Own*>(up), to,
                 static_cast<Own*>(grad_up), count, threads);
  });
}

void speculators_apply_rotary(const void* x, int x_short, const float* cos, const float* sin, void* y, int y_short,
                        int64_t rows, int64_t heads, int64_t width, int threads) {
  either(x, x_short, [&](const auto* from) {
    either(y, y_short, [&](auto* to) { apply_rotary(from, cos, sin, to, rows, heads, width, threads); });
  });
}

void speculators_nesterov_momentum(float* momentum, const void* grad, int grad_short, void* direction, int direction_short,
                          int64_t rows, int64_t width, int transposed, float keep, float fresh, float ahead, int threads) {
  either(grad, grad_short, [&](const auto* from) {
    either(direction, direction_short, [&](auto* to) {
      nesterov_momentum(momentum, from, to, rows, width, transposed != 0, keep, fresh, ahead, threads);
    });
  });
}

void speculators_polynomial(Short* x, const Short* square, const float* factors, int64_t count, int64_t width,
                            int threads) {
  polynomial(x, square, factors, count, width, threads);
}

void speculators_apply_update(float* weight, Short* rounded, const void* update, int update_short, int64_t count, float keep,
                      float size, int threads) {
  either(update, update_short, [&](const auto* by) { apply_update(weight, rounded, by, count, keep, size, threads); });
}

double speculators_sum_of_squares(const void* x, int x_short, int64_t count, int threads) {
  double sums[PARTS], all = 0;
  either(x, x_short, [&](const auto* from) { sum_of_squares(from, count, sums, threads); });
  for (const double sum : sums) all += sum;
  return all;
}
}
