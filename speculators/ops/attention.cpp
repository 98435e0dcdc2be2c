// Attention in which every query sees a range of the context and a few keys of its own block; nothing else is computed.
//
// Blocks of queries [M, L, Q, D] see, of the context [C, G, D], positions `first` to `end` (exclusive) [M], and the
// block's own keys [M, S, G, D]; with `causal`, the queries are the last L of S slots, and see no key after their own.
// Q / G query heads share a key head. The backward pass recomputes scores from their logsumexp (Dao et al. 2022,
// arXiv:2205.14135).
//
// A task is a block's queries of one group of heads; in the backward pass, a run of blocks, because the gradient of a
// context key is a sum over its blocks. A task's numbers stay in a core's cache, in rows of whole vectors: D, C and S
// are rounded up to lanes and padded with zeros.

#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "numbers.h"

namespace {

using Lanes = float __attribute__((vector_size(LANES * sizeof(float))));

inline Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}
inline void store(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof(lanes)); }

inline int64_t round_up(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

struct Sizes {
  int64_t blocks, length, heads, width, context, groups, slots;
  int causal;

  int64_t shared() const { return heads / groups; }
  // Queries of a task.
  int64_t queries() const { return length * shared(); }
  // Offset of a task's query i in [M, L, Q, D].
  int64_t query(int64_t block, int64_t group, int64_t i) const {
    return ((block * length + i / shared()) * heads + group * shared() + i % shared()) * width;
  }
  // Keys of its block that query i sees.
  int64_t visible(int64_t i) const { return causal ? slots - length + 1 + i / shared() : slots; }
};

// Calls a function for 4, 3, 2 or 1 queries at a time, so that their sums stay in registers.
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

// s[i][k] = dot(q[i], key k), a multiple of LANES keys at a time; the keys are transposed, [D, stride].
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

// out[i] += sum over k of p[i][k] * rows[k], for i < to and k < count. The strides `p_row` of i and `p_column` of k allow
// sums over keys as well as over queries.
void mix(const float* p, int64_t p_row, int64_t p_column, int64_t to, int64_t count, const float* rows, int64_t row,
         float* out) {
  by_fours(to, [&](auto n, int64_t i) {
    const float* const p_i = p + i * p_row;
    int64_t d = 0;
    for (; d + 4 * LANES <= row; d += 4 * LANES)
      mix_tile<n, 4>(p_i, p_row, p_column, count, rows + d, row, out + i * row + d);
    for (; d < row; d += LANES) mix_tile<n, 1>(p_i, p_row, p_column, count, rows + d, row, out + i * row + d);
  });
}

// Copies n rows of `width` numbers, `stride` apart, padded to lanes; to `transposed`, if given, also as [width, n].
void lay_out(const float* from, int64_t n, int64_t stride, int64_t width, float* rows, float* transposed) {
  const int64_t row = round_up(width), columns = round_up(n);
  for (int64_t k = 0; k < n; ++k) {
    std::copy_n(from + k * stride, width, rows + k * row);
    if (transposed)
      for (int64_t d = 0; d < width; ++d) transposed[d * columns + k] = from[k * stride + d];
  }
}

// Keys or values of the context as [G, C, D], rows padded to lanes.
struct ContextRows {
  int64_t row, context;
  std::vector<float> numbers;

  ContextRows(const Sizes& z, const float* from)
      : row(round_up(z.width)), context(z.context), numbers(z.groups * context * row) {
    for (int64_t k = 0; k < context; ++k)
      for (int64_t g = 0; g < z.groups; ++g)
        std::copy_n(from + (k * z.groups + g) * z.width, z.width, numbers.data() + (g * context + k) * row);
  }
  const float* data(int64_t group, int64_t position) const { return numbers.data() + (group * context + position) * row; }
};

// The same transposed, [G, D, C]; each row has LANES more numbers, for a range of keys that is rounded up at its end.
struct ContextColumns {
  int64_t columns, width;
  std::vector<float> numbers;

  ContextColumns(const Sizes& z, const float* from, int threads)
      : columns(round_up(z.context) + LANES), width(z.width), numbers(z.groups * width * columns) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t g = 0; g < z.groups; ++g)
      for (int64_t k = 0; k < z.context; ++k)
        for (int64_t d = 0; d < width; ++d)
          numbers[(g * width + d) * columns + k] = from[(k * z.groups + g) * width + d];
  }
  const float* data(int64_t group, int64_t position) const { return numbers.data() + group * width * columns + position; }
};

// Working memory of one thread, and the scores of its current task.
struct Task {
  const Sizes& z;
  const int64_t row, block_columns;
  // Context positions that the current block sees, the same rounded up to lanes, and columns of a row of scores.
  int64_t seen = 0, padded_seen = 0, columns = 0;
  std::vector<float> q, scores, block_rows, block_transposed;

  explicit Task(const Sizes& sizes)
      : z(sizes), row(round_up(sizes.width)), block_columns(round_up(sizes.slots)), q(sizes.queries() * row),
        block_rows(sizes.slots * row), block_transposed(sizes.width * block_columns) {}

  void set_seen(int64_t positions) {
    seen = positions, padded_seen = round_up(positions), columns = padded_seen + block_columns;
  }
  // Copies a task's rows of queries or of gradients, times `scale`.
  void load_rows(const float* in, int64_t block, int64_t group, float scale, std::vector<float>& out) const {
    for (int64_t i = 0; i < z.queries(); ++i)
      for (int64_t d = 0; d < z.width; ++d) out[i * row + d] = in[z.query(block, group, i) + d] * scale;
  }
  // Products of rows with all keys that the block sees, [queries, columns]; undefined in padding.
  void products(const std::vector<float>& rows, const ContextColumns& context, int64_t begin, const float* block_keys,
                int64_t block, int64_t group, std::vector<float>& out) {
    out.resize(z.queries() * columns);
    dots(rows.data(), z.queries(), row, context.data(group, begin), context.columns, z.width, padded_seen, out.data(),
         columns);
    lay_out(block_keys + (block * z.slots * z.groups + group) * z.width, z.slots, z.groups * z.width, z.width,
            block_rows.data(), block_transposed.data());
    dots(rows.data(), z.queries(), row, block_transposed.data(), block_columns, z.width, block_columns,
         out.data() + padded_seen, columns);
  }
  // Sets the scores of keys that query i does not see.
  void mask(int64_t i, float value) {
    float* const s = scores.data() + i * columns;
    std::fill(s + seen, s + padded_seen, value);
    std::fill(s + padded_seen + z.visible(i), s + columns, value);
  }
};

void attention(const Sizes& z, const float* q, const float* keys, const float* values, const float* block_keys,
               const float* block_values, const int64_t* first, const int64_t* end, float* out, float* logsumexp,
               int threads) {
  const ContextColumns k(z, keys, threads);
  const ContextRows v(z, values);
  const float scale = 1.0f / std::sqrt(float(z.width));
#pragma omp parallel num_threads(threads)
  {
    Task task(z);
    std::vector<float> mixed(z.queries() * task.row);
#pragma omp for schedule(dynamic, 4) nowait
    for (int64_t index = 0; index < z.blocks * z.groups; ++index) {
      const int64_t m = index / z.groups, g = index % z.groups, begin = first[m];
      task.set_seen(end[m] - begin);
      task.load_rows(q, m, g, scale, task.q);
      task.products(task.q, k, begin, block_keys, m, g, task.scores);
      std::fill(mixed.begin(), mixed.end(), 0.0f);
      std::vector<float> sums(z.queries());
      for (int64_t i = 0; i < z.queries(); ++i) {
        task.mask(i, -INFINITY);
        float* const scores = task.scores.data() + i * task.columns;
        const float top = max_of(scores, task.columns);
        sums[i] = exponentials(scores, top, scores, task.columns);
        logsumexp[z.query(m, g, i) / z.width] = top + std::log(sums[i]);
        task.mask(i, 0.0f);
      }
      mix(task.scores.data(), task.columns, 1, z.queries(), task.seen, v.data(g, begin), task.row, mixed.data());
      lay_out(block_values + (m * z.slots * z.groups + g) * z.width, z.slots, z.groups * z.width, z.width,
              task.block_rows.data(), nullptr);
      mix(task.scores.data() + task.padded_seen, task.columns, 1, z.queries(), z.slots, task.block_rows.data(), task.row,
          mixed.data());
      for (int64_t i = 0; i < z.queries(); ++i)
        for (int64_t d = 0; d < z.width; ++d) out[z.query(m, g, i) + d] = mixed[i * task.row + d] / sums[i];
    }
  }
}

// Runs of blocks that share no context position: the first block of each run, and then the number of blocks.
std::vector<int64_t> runs(const Sizes& z, const int64_t* first, const int64_t* end) {
  std::vector<int64_t> bounds;
  int64_t last_end = 0;
  for (int64_t m = 0; m < z.blocks; ++m) {
    if (m == 0 || first[m] >= last_end) bounds.push_back(m);
    last_end = std::max(last_end, end[m]);
  }
  bounds.push_back(z.blocks);
  return bounds;
}

struct Gradients {
  float *q, *keys, *values, *block_keys, *block_values;
};

// Backward pass of one block and group. `grad_keys` and `grad_values` are the group's, in rows padded to lanes.
void block_backward(Task& task, std::vector<float>& grad_rows, std::vector<float>& grad_scores, int64_t m, int64_t g,
                    int64_t begin, const float* grad, const float* out, const float* logsumexp, const float* q,
                    const ContextRows& key_rows, const ContextColumns& k, const ContextColumns& v,
                    const float* block_keys, const float* block_values, float* grad_keys, float* grad_values, const Gradients& grads) {
  const Sizes& z = task.z;
  const float scale = 1.0f / std::sqrt(float(z.width));
  const int64_t block_offset = (m * z.slots * z.groups + g) * z.width, stride = z.groups * z.width;
  task.load_rows(grad, m, g, 1.0f, grad_rows);
  task.products(grad_rows, v, begin, block_values, m, g, grad_scores);
  task.load_rows(q, m, g, scale, task.q);
  task.products(task.q, k, begin, block_keys, m, g, task.scores);  // leaves the keys in block_rows
  for (int64_t i = 0; i < z.queries(); ++i) {
    const int64_t offset = z.query(m, g, i);
    const float log = logsumexp[offset / z.width];
    const float mean = sum_of(z.width, [=](int64_t d) { return grad[offset + d] * out[offset + d]; });
    float* const p = task.scores.data() + i * task.columns;
    float* const h = grad_scores.data() + i * task.columns;
#pragma omp simd
    for (int64_t j = 0; j < task.columns; ++j) p[j] = exponential(p[j] - log);
    task.mask(i, 0.0f);
#pragma omp simd
    for (int64_t j = 0; j < task.columns; ++j) h[j] = p[j] * (h[j] - mean);
  }
  const float* const p = task.scores.data();
  const float* const h = grad_scores.data();
  std::vector<float> query_sums(z.queries() * task.row), block_sums(z.slots * task.row);
  mix(h, task.columns, 1, z.queries(), task.seen, key_rows.data(g, begin), task.row, query_sums.data());
  mix(h + task.padded_seen, task.columns, 1, z.queries(), z.slots, task.block_rows.data(), task.row, query_sums.data());
  for (int64_t i = 0; i < z.queries(); ++i)
    for (int64_t d = 0; d < z.width; ++d) grads.q[z.query(m, g, i) + d] = query_sums[i * task.row + d] * scale;
  mix(h, 1, task.columns, task.seen, z.queries(), task.q.data(), task.row, grad_keys + begin * task.row);
  mix(p, 1, task.columns, task.seen, z.queries(), grad_rows.data(), task.row, grad_values + begin * task.row);
  const auto write_block = [&](const float* factors, const std::vector<float>& rows, float* to) {
    std::fill(block_sums.begin(), block_sums.end(), 0.0f);
    mix(factors + task.padded_seen, 1, task.columns, z.slots, z.queries(), rows.data(), task.row, block_sums.data());
    for (int64_t j = 0; j < z.slots; ++j)
      std::copy_n(block_sums.data() + j * task.row, z.width, to + block_offset + j * stride);
  };
  write_block(h, task.q, grads.block_keys);
  write_block(p, grad_rows, grads.block_values);
}

void attention_backward(const Sizes& z, const float* grad, const float* out, const float* logsumexp, const float* q,
                        const float* keys, const float* values, const float* block_keys, const float* block_values,
                        const int64_t* first, const int64_t* end, const Gradients& grads, int threads) {
  const ContextRows key_rows(z, keys);
  const ContextColumns k(z, keys, threads), v(z, values, threads);
  const std::vector<int64_t> bounds = runs(z, first, end);
  const int64_t count = int64_t(bounds.size()) - 1, row = round_up(z.width);
  // Longest runs first, so that none is left to a single thread at the end.
  std::vector<int64_t> work(count), order(count);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t m = bounds[r]; m < bounds[r + 1]; ++m) work[r] += end[m] - first[m] + z.slots;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return work[a] > work[b]; });
  std::vector<float> grad_keys(z.groups * z.context * row), grad_values(z.groups * z.context * row);
#pragma omp parallel num_threads(threads)
  {
    Task task(z);
    std::vector<float> grad_rows(z.queries() * task.row), grad_scores;
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < count * z.groups; ++index) {
      const int64_t r = order[index / z.groups], g = index % z.groups, offset = g * z.context * row;
      for (int64_t m = bounds[r]; m < bounds[r + 1]; ++m) {
        task.set_seen(end[m] - first[m]);
        block_backward(task, grad_rows, grad_scores, m, g, first[m], grad, out, logsumexp, q, key_rows, k, v, block_keys,
                       block_values, grad_keys.data() + offset, grad_values.data() + offset, grads);
      }
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < z.context; ++c)
      for (int64_t g = 0; g < z.groups; ++g) {
        const int64_t from = (g * z.context + c) * row, to = (c * z.groups + g) * z.width;
        std::copy_n(grad_keys.data() + from, z.width, grads.keys + to);
        std::copy_n(grad_values.data() + from, z.width, grads.values + to);
      }
  }
}

}  // namespace

extern "C" {

void speculators_attention(const float* q, const float* keys, const float* values, const float* block_keys,
                           const float* block_values, const int64_t* first, const int64_t* end, float* out,
                           float* logsumexp, int64_t blocks, int64_t length, int64_t heads, int64_t width,
                           int64_t context, int64_t groups, int64_t slots, int causal, int threads) {
  attention({blocks, length, heads, width, context, groups, slots, causal}, q, keys, values, block_keys, block_values,
            first, end, out, logsumexp, threads);
}

void speculators_attention_backward(const float* grad, const float* out, const float* logsumexp, const float* q,
                                    const float* keys, const float* values, const float* block_keys,
                                    const float* block_values, const int64_t* first, const int64_t* end, float* grad_q,
                                    float* grad_keys, float* grad_values, float* grad_block_keys, float* grad_block_values,
                                    int64_t blocks, int64_t length, int64_t heads, int64_t width, int64_t context,
                                    int64_t groups, int64_t slots, int causal, int threads) {
  attention_backward({blocks, length, heads, width, context, groups, slots, causal}, grad, out, logsumexp, q, keys, values,
                     block_keys, block_values, first, end,
                     {grad_q, grad_keys, grad_values, grad_block_keys, grad_block_values}, threads);
}
}
