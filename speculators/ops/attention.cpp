// Attention in which every query sees a range of the context and a few keys of its own, and nothing else is computed.
//
// Queries come in blocks [M, L, Q, D] whose queries see the same: of the context [C, G, D] the places from `first` up to
// `end` [M], and the block's own keys [M, S, G, D]; with `causal`, the last L of S slots ask, and see none after their
// own. Q / G query heads share a key. Scores are made again for the grads, from the logarithms of what they were
// divided by (Dao et al. 2022, arXiv:2205.14135).
//
// A task is a block's queries of one group of heads, or for the grads a run of blocks, because those of its context
// are sums over all of its blocks. Numbers of a task lie in a core's cache, in rows of whole vectors: D, C and S are
// rounded up to lanes, and zeros fill the rest.

#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "numbers.h"

namespace {

using Lanes = float __attribute__((vector_size(LANES * sizeof(float))));

inline Lanes load(const float* from) {
  Lanes found;
  std::memcpy(&found, from, sizeof(found));
  return found;
}
inline void store(float* to, Lanes what) { std::memcpy(to, &what, sizeof(what)); }

inline int64_t whole(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

struct Sizes {
  int64_t blocks, length, heads, width, context, groups, slots;
  int causal;

  int64_t shared() const { return heads / groups; }
  // Queries of a task.
  int64_t queries() const { return length * shared(); }
  // Where query i of a task begins in [M, L, Q, D].
  int64_t query(int64_t block, int64_t group, int64_t i) const {
    return ((block * length + i / shared()) * heads + group * shared() + i % shared()) * width;
  }
  // Own keys that query i sees.
  int64_t visible(int64_t i) const { return causal ? slots - length + 1 + i / shared() : slots; }
};

// Call with N = 4, 3, 2 or 1 queries at a time, so that their sums stay in registers.
template <class F>
inline void by_fours(int64_t count, F call) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) call(std::integral_constant<int, 4>(), i);
  if (count - i == 3) call(std::integral_constant<int, 3>(), i);
  if (count - i == 2) call(std::integral_constant<int, 2>(), i);
  if (count - i == 1) call(std::integral_constant<int, 1>(), i);
}

template <int N, int T>
inline void dot_tile(const float* q, int64_t row, const float* transposed, int64_t stride, int64_t width, float* s,
                     int64_t s_row) {
  Lanes sums[N][T] = {};
  for (int64_t d = 0; d < width; ++d)
    for (int t = 0; t < T; ++t) {
      const Lanes key = load(transposed + d * stride + t * LANES);
      for (int i = 0; i < N; ++i) sums[i][t] += q[i * row + d] * key;
    }
  for (int i = 0; i < N; ++i)
    for (int t = 0; t < T; ++t) store(s + i * s_row + t * LANES, sums[i][t]);
}

// s[i][k] = sum(q[i] * key k) for whole lanes of keys, which lie transposed [D, stride].
void dots(const float* q, int64_t count, int64_t row, const float* transposed, int64_t stride, int64_t width, int64_t keys,
          float* s, int64_t s_row) {
  by_fours(count, [&](auto n, int64_t i) {
    int64_t k = 0;
    for (; k + 4 * LANES <= keys; k += 4 * LANES)
      dot_tile<n, 4>(q + i * row, row, transposed + k, stride, width, s + i * s_row + k, s_row);
    for (; k < keys; k += LANES) dot_tile<n, 1>(q + i * row, row, transposed + k, stride, width, s + i * s_row + k, s_row);
  });
}

template <int N, int T>
inline void mix_tile(const float* p, int64_t p_row, int64_t p_column, int64_t count, const float* rows, int64_t row,
                     float* out) {
  Lanes sums[N][T];
  for (int i = 0; i < N; ++i)
    for (int t = 0; t < T; ++t) sums[i][t] = load(out + i * row + t * LANES);
  for (int64_t k = 0; k < count; ++k)
    for (int t = 0; t < T; ++t) {
      const Lanes from = load(rows + k * row + t * LANES);
      for (int i = 0; i < N; ++i) sums[i][t] += p[i * p_row + k * p_column] * from;
    }
  for (int i = 0; i < N; ++i)
    for (int t = 0; t < T; ++t) store(out + i * row + t * LANES, sums[i][t]);
}

// out[i] += sum(p[i][k] * rows[k]), for `to` of them over `count`; the p of a step in i or k lie `p_row` or `p_column`
// apart, so that of queries and keys either can be summed over.
void mix(const float* p, int64_t p_row, int64_t p_column, int64_t to, int64_t count, const float* rows, int64_t row,
         float* out) {
  by_fours(to, [&](auto n, int64_t i) {
    const float* const own = p + i * p_row;
    int64_t d = 0;
    for (; d + 4 * LANES <= row; d += 4 * LANES)
      mix_tile<n, 4>(own, p_row, p_column, count, rows + d, row, out + i * row + d);
    for (; d < row; d += LANES) mix_tile<n, 1>(own, p_row, p_column, count, rows + d, row, out + i * row + d);
  });
}

// Rows [n, stride] of `width` numbers: each in whole lanes, and if queries for transposed [width, n in whole lanes].
void lay_out(const float* from, int64_t n, int64_t stride, int64_t width, float* rows, float* transposed) {
  const int64_t row = whole(width), columns = whole(n);
  for (int64_t k = 0; k < n; ++k) {
    std::copy_n(from + k * stride, width, rows + k * row);
    if (transposed)
      for (int64_t d = 0; d < width; ++d) transposed[d * columns + k] = from[k * stride + d];
  }
}

// Keys or values of the context [C, G, D], group by group: [G, C, D], each in whole lanes.
struct Rows {
  int64_t row, context;
  std::vector<float> numbers;

  Rows(const Sizes& z, const float* from) : row(whole(z.width)), context(z.context), numbers(z.groups * context * row) {
    for (int64_t k = 0; k < context; ++k)
      for (int64_t g = 0; g < z.groups; ++g)
        std::copy_n(from + (k * z.groups + g) * z.width, z.width, numbers.data() + (g * context + k) * row);
  }
  const float* at(int64_t group, int64_t place) const { return numbers.data() + (group * context + place) * row; }
};

// The same transposed, [G, D, C], with room behind each row for the whole lanes of what begins at its end.
struct Turned {
  int64_t columns, width;
  std::vector<float> numbers;

  Turned(const Sizes& z, const float* from, int threads)
      : columns(whole(z.context) + LANES), width(z.width), numbers(z.groups * width * columns) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t g = 0; g < z.groups; ++g)
      for (int64_t k = 0; k < z.context; ++k)
        for (int64_t d = 0; d < width; ++d)
          numbers[(g * width + d) * columns + k] = from[(k * z.groups + g) * width + d];
  }
  const float* at(int64_t group, int64_t place) const { return numbers.data() + group * width * columns + place; }
};

// What one thread needs for a task.
struct Task {
  const Sizes& z;
  const int64_t row, own_columns;
  // Of the block it is at: places of the context that are seen, the same in whole lanes, and columns of a row of scores.
  int64_t seen = 0, before = 0, columns = 0;
  std::vector<float> q, s, own_rows, own_turned;

  explicit Task(const Sizes& sizes)
      : z(sizes), row(whole(sizes.width)), own_columns(whole(sizes.slots)), q(sizes.queries() * row),
        own_rows(sizes.slots * row), own_turned(sizes.width * own_columns) {}

  void at(int64_t places) {
    seen = places, before = whole(places), columns = before + own_columns;
  }
  void take(const float* from, int64_t block, int64_t group, float scale, std::vector<float>& to) const {
    for (int64_t i = 0; i < z.queries(); ++i)
      for (int64_t d = 0; d < z.width; ++d) to[i * row + d] = from[z.query(block, group, i) + d] * scale;
  }
  // Products of queries with what a block sees, [queries, columns]; what lies between is anything.
  void products(const std::vector<float>& with, const Turned& transposed, int64_t begin, const float* own, int64_t block,
                int64_t group, std::vector<float>& found) {
    found.resize(z.queries() * columns);
    dots(with.data(), z.queries(), row, transposed.at(group, begin), transposed.columns, z.width, before, found.data(),
         columns);
    lay_out(own + (block * z.slots * z.groups + group) * z.width, z.slots, z.groups * z.width, z.width, own_rows.data(),
            own_turned.data());
    dots(with.data(), z.queries(), row, own_turned.data(), own_columns, z.width, own_columns, found.data() + before,
         columns);
  }
  // What query i does not see becomes `value`.
  void hide(int64_t i, float value) {
    float* const scores = s.data() + i * columns;
    std::fill(scores + seen, scores + before, value);
    std::fill(scores + before + z.visible(i), scores + columns, value);
  }
};

void attention(const Sizes& z, const float* q, const float* keys, const float* values, const float* own_keys,
            const float* own_values, const int64_t* first, const int64_t* end, float* out, float* logs, int threads) {
  const Turned k(z, keys, threads);
  const Rows v(z, values);
  const float scale = 1.0f / std::sqrt(float(z.width));
#pragma omp parallel num_threads(threads)
  {
    Task task(z);
    std::vector<float> mixed(z.queries() * task.row);
#pragma omp for schedule(dynamic, 4) nowait
    for (int64_t at = 0; at < z.blocks * z.groups; ++at) {
      const int64_t m = at / z.groups, g = at % z.groups, begin = first[m];
      task.at(end[m] - begin);
      task.take(q, m, g, scale, task.q);
      task.products(task.q, k, begin, own_keys, m, g, task.s);
      std::fill(mixed.begin(), mixed.end(), 0.0f);
      std::vector<float> sums(z.queries());
      for (int64_t i = 0; i < z.queries(); ++i) {
        task.hide(i, -INFINITY);
        float* const scores = task.s.data() + i * task.columns;
        const float top = largest(scores, task.columns);
        sums[i] = powers(scores, top, scores, task.columns);
        logs[z.query(m, g, i) / z.width] = top + std::log(sums[i]);
        task.hide(i, 0.0f);
      }
      mix(task.s.data(), task.columns, 1, z.queries(), task.seen, v.at(g, begin), task.row, mixed.data());
      lay_out(own_values + (m * z.slots * z.groups + g) * z.width, z.slots, z.groups * z.width, z.width,
              task.own_rows.data(), nullptr);
      mix(task.s.data() + task.before, task.columns, 1, z.queries(), z.slots, task.own_rows.data(), task.row,
          mixed.data());
      for (int64_t i = 0; i < z.queries(); ++i)
        for (int64_t d = 0; d < z.width; ++d) out[z.query(m, g, i) + d] = mixed[i * task.row + d] / sums[i];
    }
  }
}

// Runs of blocks between which no place of the context is shared: the first block of each, and the number of blocks.
std::vector<int64_t> runs(const Sizes& z, const int64_t* first, const int64_t* end) {
  std::vector<int64_t> found;
  int64_t furthest = 0;
  for (int64_t m = 0; m < z.blocks; ++m) {
    if (m == 0 || first[m] >= furthest) found.push_back(m);
    furthest = std::max(furthest, end[m]);
  }
  found.push_back(z.blocks);
  return found;
}

struct Slopes {
  float *q, *keys, *values, *own_keys, *own_values;
};

// Of one block; `of_keys` and `of_values` are those of the group's context, in rows of whole lanes.
void block_slopes(Task& task, std::vector<float>& grads, std::vector<float>& pull, int64_t m, int64_t g, int64_t begin,
                  const float* grad, const float* out, const float* logs, const float* q, const Rows& key_rows,
                  const Turned& k, const Turned& v, const float* own_keys, const float* own_values, float* of_keys, float* of_values,
                  const Slopes& of) {
  const Sizes& z = task.z;
  const float scale = 1.0f / std::sqrt(float(z.width));
  const int64_t own = (m * z.slots * z.groups + g) * z.width, stride = z.groups * z.width;
  task.take(grad, m, g, 1.0f, grads);
  task.products(grads, v, begin, own_values, m, g, pull);
  task.take(q, m, g, scale, task.q);
  task.products(task.q, k, begin, own_keys, m, g, task.s);
  for (int64_t i = 0; i < z.queries(); ++i) {
    const int64_t at = z.query(m, g, i);
    const float log = logs[at / z.width];
    const float mean = total(z.width, [=](int64_t d) { return grad[at + d] * out[at + d]; });
    float* const p = task.s.data() + i * task.columns;
    float* const h = pull.data() + i * task.columns;
#pragma omp simd
    for (int64_t j = 0; j < task.columns; ++j) p[j] = exponential(p[j] - log);
    task.hide(i, 0.0f);
#pragma omp simd
    for (int64_t j = 0; j < task.columns; ++j) h[j] = p[j] * (h[j] - mean);
  }
  const float* const s = task.s.data();
  std::vector<float> moved(z.queries() * task.row), own_moved(z.slots * task.row);
  mix(pull.data(), task.columns, 1, z.queries(), task.seen, key_rows.at(g, begin), task.row, moved.data());
  mix(pull.data() + task.before, task.columns, 1, z.queries(), z.slots, task.own_rows.data(), task.row, moved.data());
  for (int64_t i = 0; i < z.queries(); ++i)
    for (int64_t d = 0; d < z.width; ++d) of.q[z.query(m, g, i) + d] = moved[i * task.row + d] * scale;
  mix(pull.data(), 1, task.columns, task.seen, z.queries(), task.q.data(), task.row, of_keys + begin * task.row);
  mix(s, 1, task.columns, task.seen, z.queries(), grads.data(), task.row, of_values + begin * task.row);
  const auto put_own = [&](const float* by, const std::vector<float>& with, float* to) {
    std::fill(own_moved.begin(), own_moved.end(), 0.0f);
    mix(by + task.before, 1, task.columns, z.slots, z.queries(), with.data(), task.row, own_moved.data());
    for (int64_t j = 0; j < z.slots; ++j) std::copy_n(own_moved.data() + j * task.row, z.width, to + own + j * stride);
  };
  put_own(pull.data(), task.q, of.own_keys);
  put_own(s, grads, of.own_values);
}

void attention_backward(const Sizes& z, const float* grad, const float* out, const float* logs, const float* q,
                   const float* keys, const float* values, const float* own_keys, const float* own_values,
                   const int64_t* first, const int64_t* end, const Slopes& of, int threads) {
  const Rows key_rows(z, keys);
  const Turned k(z, keys, threads), v(z, values, threads);
  const std::vector<int64_t> bounds = runs(z, first, end);
  const int64_t count = int64_t(bounds.size()) - 1, row = whole(z.width);
  // The longest first, so that no thread is left with one at the end.
  std::vector<int64_t> work(count), order(count);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t m = bounds[r]; m < bounds[r + 1]; ++m) work[r] += end[m] - first[m] + z.slots;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return work[a] > work[b]; });
  std::vector<float> of_keys(z.groups * z.context * row), of_values(z.groups * z.context * row);
#pragma omp parallel num_threads(threads)
  {
    Task task(z);
    std::vector<float> grads(z.queries() * task.row), pull;
#pragma omp for schedule(dynamic, 1)
    for (int64_t at = 0; at < count * z.groups; ++at) {
      const int64_t r = order[at / z.groups], g = at % z.groups;
      for (int64_t m = bounds[r]; m < bounds[r + 1]; ++m) {
        task.at(end[m] - first[m]);
        block_slopes(task, grads, pull, m, g, first[m], grad, out, logs, q, key_rows, k, v, own_keys, own_values,
                     of_keys.data() + g * z.context * row, of_values.data() + g * z.context * row, of);
      }
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < z.context; ++c)
      for (int64_t g = 0; g < z.groups; ++g) {
        const int64_t from = (g * z.context + c) * row, to = (c * z.groups + g) * z.width;
        std::copy_n(of_keys.data() + from, z.width, of.keys + to);
        std::copy_n(of_values.data() + from, z.width, of.values + to);
      }
  }
}

}  // namespace

extern "C" {

void speculators_attention(const float* q, const float* keys, const float* values, const float* own_keys,
                        const float* own_values, const int64_t* first, const int64_t* end, float* out, float* logs,
                        int64_t blocks, int64_t length, int64_t heads, int64_t width, int64_t context, int64_t groups,
                        int64_t slots, int causal, int threads) {
  attention({blocks, length, heads, width, context, groups, slots, causal}, q, keys, values, own_keys, own_values, first,
         end, out, logs, threads);
}

void speculators_attention_backward(const float* grad, const float* out, const float* logs, const float* q,
                               const float* keys, const float* values, const float* own_keys, const float* own_values,
                               const int64_t* first, const int64_t* end, float* grad_q, float* of_keys, float* of_values,
                               float* of_own_keys, float* of_own_values, int64_t blocks, int64_t length, int64_t heads,
                               int64_t width, int64_t context, int64_t groups, int64_t slots, int causal, int threads) {
  attention_backward({blocks, length, heads, width, context, groups, slots, causal}, grad, out, logs, q, keys, values,
                own_keys, own_values, first, end, {grad_q, of_keys, of_values, of_own_keys, of_own_values}, threads);
}
}
