// Kernels for a training step on a CPU. Each reads and writes memory once, where torch does so once per operation.

#include <type_traits>
#include <vector>

#include "numbers.h"

namespace {

// Number of partial sums of a sum over a tensor, and of sums over columns.
constexpr int64_t CHUNKS = 256, BANDS = 32;

// First index of a value in a row; the row's width if it is not there.
template <class T>
int64_t index_of(float value, const T* row, int64_t width) {
  constexpr int64_t STRIDE = 256;
  for (int64_t begin = 0; begin < width; begin += STRIDE) {
    const int64_t end = std::min(begin + STRIDE, width);
    int match = 0;
#pragma omp simd reduction(| : match)
    for (int64_t j = begin; j < end; ++j) match |= to_float(row[j]) == value;
    if (!match) continue;
    for (int64_t j = begin; j < end; ++j)
      if (to_float(row[j]) == value) return j;
  }
  return width;
}

// Loss, agreement of the argmaxes and gradient of each row of draft logits z [n, width] against a row of target logits.
template <class Z, class W>
void losses(bool cross_entropy, Z* z, const W* target_logits, const int64_t* target_rows, const float* weight, int64_t n,
            int64_t width, bool with_grad, float* loss, uint8_t* correct, int threads) {
#pragma omp parallel num_threads(threads)
  {
    // Of the current target row: probabilities p, their logsumexp, the argmax.
    std::vector<float> target_probabilities(cross_entropy ? 0 : width), draft_exponentials(width);
    float* const p = target_probabilities.data();
    float* const q = draft_exponentials.data();
    float logsumexp = 0;
    int64_t current = -1, label = 0;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < n; ++i) {
      const W* const w = target_logits + target_rows[i] * width;
      if (target_rows[i] != current) {
        current = target_rows[i];
        const float top = max_of(w, width);
        label = index_of(top, w, width);
        if (cross_entropy) {
          // The label alone would not show that another logit is infinite or NaN.
          if (sum_of(width, [&](int64_t j) { return to_float(w[j]) * 0.0f; }) != 0) label = width;
        } else {
          const float sum = exponentials(w, top, p, width), factor = 1.0f / sum;
          logsumexp = top + std::log(sum);
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) p[j] *= factor;
        }
      }
      Z* const row = z + i * width;
      const float top = max_of(row, width), row_weight = weight ? weight[i] : 1.0f;
      const float label_logit = label < width ? to_float(row[label]) : NAN;
      correct[i] = label_logit == top && index_of(top, row, label) == label;
      const float sum = exponentials(row, top, q, width), factor = row_weight / sum;
      loss[i] = top + std::log(sum);
      if (cross_entropy) {
        loss[i] -= label_logit;
        if (!with_grad) continue;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) assign(row[j], q[j] * factor);
        if (label < width) assign(row[label], multiply_add(q[label], factor, -row_weight));
      } else {
        loss[i] += sum_of(width, [&](int64_t j) { return p[j] * (to_float(w[j]) - to_float(row[j])); }) - logsumexp;
        if (!with_grad) continue;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) assign(row[j], multiply_add(q[j], factor, -p[j] * row_weight));
      }
    }
  }
}

template <class X, class Y>
void rms_norm(const X* x, const float* weight, Y* y, float* inverse, int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) {
    const X* const in = x + i * width;
    Y* const out = y + i * width;
    const float squares = sum_of(width, [=](int64_t j) { return to_float(in[j]) * to_float(in[j]); });
    const float factor = 1.0f / std::sqrt(squares / float(width) + eps);
    inverse[i] = factor;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) assign(out[j], to_float(in[j]) * factor * weight[j]);
  }
}

// grad_x = inverse * (grad * weight - x * inverse^2 * mean(grad * weight * x)), grad_weight = sum of grad * x * inverse
// over rows.
template <class S, class X>
void rms_norm_backward(const S* grad, const X* x, const float* weight, const float* inverse, X* grad_x, float* grad_weight,
                       int64_t rows, int64_t width, int threads) {
  std::vector<float> band_sums(BANDS * width);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t band = 0; band < BANDS; ++band) {
    float* const sums = band_sums.data() + band * width;
    for (int64_t i = rows * band / BANDS; i < rows * (band + 1) / BANDS; ++i) {
      const X* const in = x + i * width;
      const S* const g = grad + i * width;
      X* const out = grad_x + i * width;
      const float factor = inverse[i];
      const float dot = sum_of(width, [=](int64_t j) { return to_float(g[j]) * weight[j] * to_float(in[j]); });
      const float projection = dot * factor * factor / float(width);
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        const float g_j = to_float(g[j]), x_j = to_float(in[j]);
        assign(out[j], factor * multiply_add(-projection, x_j, g_j * weight[j]));
        sums[j] = multiply_add(g_j, x_j * factor, sums[j]);
      }
    }
  }
  for (int64_t j = 0; j < width; ++j) {
    grad_weight[j] = 0;
    for (int64_t band = 0; band < BANDS; ++band) grad_weight[j] += band_sums[band * width + j];
  }
}

inline float sigmoid(float x) {
  const float e = exponential(-std::fabs(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

template <class T>
void silu_mul(const T* gate, const T* up, T* out, int64_t count, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
  for (int64_t j = 0; j < count; ++j) assign(out[j], to_float(gate[j]) * sigmoid(to_float(gate[j])) * to_float(up[j]));
}

template <class T>
void silu_mul_backward(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t count,
                       int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
  for (int64_t j = 0; j < count; ++j) {
    const float x = to_float(gate[j]), s = sigmoid(x), silu = x * s, g = to_float(grad[j]);
    assign(grad_up[j], g * silu);
    assign(grad_gate[j], g * to_float(up[j]) * multiply_add(silu, 1.0f - s, s));
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
    const X* const in = x + i * width;
    Y* const out = y + i * width;
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
      const float first = to_float(in[j]), second = to_float(in[j + half]);
      assign(out[j], multiply_add(first, c[j], -second * s[j]));
      assign(out[j + half], multiply_add(second, c[j], first * s[j]));
    }
  }
}

// momentum = beta * momentum + grad_factor * grad; direction = momentum + lookahead_factor * grad, also transposed.
template <class G, class A>
void nesterov_momentum(float* momentum, const G* grad, A* direction, int64_t rows, int64_t width, bool transposed,
                       float beta, float grad_factor, float lookahead_factor, int threads) {
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
        A* const out = transposed ? tile + (i - begin) * TILE : direction + i * width;
#pragma omp simd
        for (int64_t j = 0; j < last - first; ++j) {
          const float x = to_float(g[j]), updated = multiply_add(m[j], beta, x * grad_factor);
          m[j] = updated;
          if (direction) assign(out[j], multiply_add(x, lookahead_factor, updated));
        }
      }
      for (int64_t j = first; transposed && direction && j < last; ++j)
        for (int64_t i = begin; i < end; ++i) direction[j * rows + i] = tile[(i - begin) * TILE + j - first];
    }
  }
}

// x = factors[0] I + factors[1] x + factors[2] square, for each of `count` matrices.
void polynomial(Short* x, const Short* square, const float* factors, int64_t count, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < count * width; ++row) {
    const float* const f = factors + 3 * (row / width);
    Short* const g = x + row * width;
    const Short* const s = square + row * width;
    const int64_t diagonal = row % width;
    const float diagonal_value = f[0] + multiply_add(f[1], to_float(g[diagonal]), f[2] * to_float(s[diagonal]));
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) assign(g[j], multiply_add(f[1], to_float(g[j]), f[2] * to_float(s[j])));
    assign(g[diagonal], diagonal_value);
  }
}

template <class U>
void apply_update(float* weight, Short* rounded, const U* update, int64_t count, float keep, float size, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
  for (int64_t j = 0; j < count; ++j) {
    const float updated = multiply_add(weight[j], keep, -size * to_float(update[j]));
    weight[j] = updated;
    if (rounded) assign(rounded[j], updated);
  }
}

template <class T>
void sum_of_squares(const T* x, int64_t count, double* sums, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < CHUNKS; ++chunk) {
    const int64_t begin = count * chunk / CHUNKS, end = count * (chunk + 1) / CHUNKS;
    sums[chunk] = sum_of(end - begin, [=](int64_t j) { return to_float(x[begin + j]) * to_float(x[begin + j]); });
  }
}

// Calls a function with a pointer of the type that the flag selects.
template <class F>
void with_format(const void* x, int is_short, F call) {
  if (is_short) call(static_cast<const Short*>(x));
  else call(static_cast<const float*>(x));
}

template <class F>
void with_format(void* x, int is_short, F call) {
  if (is_short) call(static_cast<Short*>(x));
  else call(static_cast<float*>(x));
}

}  // namespace

// The argument after a matrix of either format tells whether it is the short one.
extern "C" {

void speculators_losses(int cross_entropy, void* z, int z_short, const void* target_logits, int target_short,
                        const int64_t* target_rows, const float* weight, int64_t n, int64_t width, int with_grad,
                        float* loss, uint8_t* correct, int threads) {
  with_format(z, z_short, [&](auto* draft) {
    with_format(target_logits, target_short, [&](const auto* target) {
      losses(cross_entropy != 0, draft, target, target_rows, weight, n, width, with_grad != 0, loss, correct, threads);
    });
  });
}

void speculators_rms_norm(const void* x, int x_short, const float* weight, void* y, int y_short, float* inverse,
                      int64_t rows, int64_t width, float eps, int threads) {
  with_format(x, x_short, [&](const auto* in) {
    with_format(y, y_short, [&](auto* out) { rms_norm(in, weight, out, inverse, rows, width, eps, threads); });
  });
}

void speculators_rms_norm_backward(const void* grad, int grad_short, const void* x, int x_short, const float* weight,
                             const float* inverse, void* grad_x, float* grad_weight, int64_t rows, int64_t width,
                             int threads) {
  with_format(grad, grad_short, [&](const auto* g) {
    with_format(grad_x, x_short, [&](auto* out) {
      using Value = const std::remove_pointer_t<decltype(out)>*;
      rms_norm_backward(g, static_cast<Value>(x), weight, inverse, out, grad_weight, rows, width, threads);
    });
  });
}

void speculators_silu_mul(const void* gate, const void* up, void* out, int all_short, int64_t count, int threads) {
  with_format(out, all_short, [&](auto* out) {
    using Value = const std::remove_pointer_t<decltype(out)>*;
    silu_mul(static_cast<Value>(gate), static_cast<Value>(up), out, count, threads);
  });
}

void speculators_silu_mul_backward(const void* grad, const void* gate, const void* up, void* grad_gate, void* grad_up,
                              int all_short, int64_t count, int threads) {
  with_format(grad_gate, all_short, [&](auto* out) {
    using Value = std::remove_pointer_t<decltype(out)>;
    silu_mul_backward(static_cast<const Value*>(grad), static_cast<const Value*>(gate), static_cast<const Value*>(up), out,
                 static_cast<Value*>(grad_up), count, threads);
  });
}

void speculators_apply_rotary(const void* x, int x_short, const float* cos, const float* sin, void* y, int y_short,
                        int64_t rows, int64_t heads, int64_t width, int threads) {
  with_format(x, x_short, [&](const auto* in) {
    with_format(y, y_short, [&](auto* out) { apply_rotary(in, cos, sin, out, rows, heads, width, threads); });
  });
}

void speculators_nesterov_momentum(float* momentum, const void* grad, int grad_short, void* direction,
                                   int direction_short, int64_t rows, int64_t width, int transposed, float beta,
                                   float grad_factor, float lookahead_factor, int threads) {
  with_format(grad, grad_short, [&](const auto* in) {
    with_format(direction, direction_short, [&](auto* out) {
      nesterov_momentum(momentum, in, out, rows, width, transposed != 0, beta, grad_factor, lookahead_factor, threads);
    });
  });
}

void speculators_polynomial(Short* x, const Short* square, const float* factors, int64_t count, int64_t width,
                            int threads) {
  polynomial(x, square, factors, count, width, threads);
}

void speculators_apply_update(float* weight, Short* rounded, const void* update, int update_short, int64_t count, float keep,
                      float size, int threads) {
  with_format(update, update_short, [&](const auto* values) {
    apply_update(weight, rounded, values, count, keep, size, threads);
  });
}

double speculators_sum_of_squares(const void* x, int x_short, int64_t count, int threads) {
  double sums[CHUNKS], total = 0;
  with_format(x, x_short, [&](const auto* in) { sum_of_squares(in, count, sums, threads); });
  for (const double sum : sums) total += sum;
  return total;
}
}
