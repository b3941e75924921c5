// One query token a row against the KV of its own slot, up to its own position: slots::attend.
//
// Knows no slot's owner and writes no KV. A row costs what its own length costs, whatever the longest is. Softmax in
// one pass over the columns, a tile at a time (Milakov and Gimelshein, 2018). The only token of its slot, as in
// decoding, has the same bits in any batch; tokens of one prompt share the work of reading their columns.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

using torch::stable::Tensor;

namespace {

constexpr int64_t kTile = 64;  // columns whose scores are held at once; divides a page
constexpr int64_t kRun = 32;   // most tokens of one prompt that are computed together

// The state of G query heads that share a KV head, one tile of columns after another (softmax in one pass).
template <int G>
struct Heads {
  const float* q;  // [G][d]
  float* out;      // [G][d], the weighted sum of the values so far
  int64_t d;
  float scale;
  float best[G], total[G];
  alignas(32) float weight[G][kTile];

  Heads(const float* queries, float* to, int64_t width, float by) : q(queries), out(to), d(width), scale(by) {
    std::fill(out, out + G * d, 0.0f);
    std::fill(best, best + G, -INFINITY);
    std::fill(total, total + G, 0.0f);
  }

  template <typename T>
  void score(const T* keys, int64_t count) {
    for (int64_t t = 0; t < count; t++, keys += d) {
      Floats sums[G] = {};
      for (int64_t i = 0; i < d; i += 8) {
        const Floats key = load(keys + i);
        for (int g = 0; g < G; g++) sums[g] += key * load(q + g * d + i);
      }
      for (int g = 0; g < G; g++) weight[g][t] = sum(sums[g]) * scale;
    }
  }

  // As above, from a tile of keys that lie [d][kTile], eight columns to a vector: no sums across lanes.
  void score_columns(const float* keys) {
    for (int64_t c = 0; c < kTile; c += 32) {
      Floats sums[G][4] = {};
      for (int64_t i = 0; i < d; i++)
        for (int v = 0; v < 4; v++) {
          const Floats key = load(keys + i * kTile + c + 8 * v);
          for (int g = 0; g < G; g++) sums[g][v] += key * q[g * d + i];
        }
      for (int g = 0; g < G; g++)
        for (int v = 0; v < 4; v++) store(&weight[g][c + 8 * v], sums[g][v] * scale);
    }
  }

  void normalise(int64_t count) {
    for (int g = 0; g < G; g++) {
      for (int64_t t = count; t % 8; t++) weight[g][t] = -INFINITY;
      float top = best[g];
      for (int64_t t = 0; t < count; t++) top = weight[g][t] > top ? weight[g][t] : top;
      const float shrink = std::exp(best[g] - top);
      Floats sums = {};
      for (int64_t t = 0; t < count; t += 8) {
        const Floats w = exponential(load(&weight[g][t]) - top);
        store(&weight[g][t], w);
        sums += w;
      }
      total[g] = total[g] * shrink + sum(sums);
      best[g] = top;
      for (int64_t i = 0; i < d; i++) out[g * d + i] *= shrink;
    }
  }

  template <typename T>
  void gather(const T* values, int64_t count) {
    for (int64_t i = 0; i < d; i += 16) {
      Floats left[G], right[G];
      for (int g = 0; g < G; g++) left[g] = load(out + g * d + i), right[g] = load(out + g * d + i + 8);
      const T* value = values + i;
      for (int64_t t = 0; t < count; t++, value += d)
        for (int g = 0; g < G; g++) left[g] += load(value) * weight[g][t], right[g] += load(value + 8) * weight[g][t];
      for (int g = 0; g < G; g++) store(out + g * d + i, left[g]), store(out + g * d + i + 8, right[g]);
    }
  }

  void finish() {
    for (int g = 0; g < G; g++)
      for (int64_t i = 0; i < d; i++) out[g * d + i] /= total[g];
  }
};

struct Pages {
  int64_t slots, heads, size, d;  // of [pages, slots, heads, size, d]

  explicit Pages(const Tensor& keys) : slots(keys.size(1)), heads(keys.size(2)), size(keys.size(3)), d(keys.size(4)) {}

  // The first element of a column; columns up to the end of its page follow.
  int64_t at(int64_t slot, int64_t head, int64_t column) const {
    return (((column / size * slots + slot) * heads + head) * size + column % size) * d;
  }
};

// What all tasks read. T: float, or uint16_t for bfloat16.
template <typename T>
struct Call {
  Pages pages;
  int64_t heads, group;
  const float* q;
  const T *keys, *values;
  const int64_t *slots, *positions;
  float scale;
  float* out;

  // The single token of a row, for G of the query heads that share a KV head.
  template <int G>
  void alone(int64_t row, int64_t head, int64_t first) const {
    const int64_t at = (row * heads + first) * pages.d, length = positions[row] + 1;
    Heads<G> mine(q + at, out + at, pages.d, scale);
    for (int64_t begin = 0; begin < length; begin += kTile) {
      const int64_t count = std::min(kTile, length - begin), place = pages.at(slots[row], head, begin);
      mine.score(keys + place, count);
      mine.normalise(count);
      mine.gather(values + place, count);
    }
    mine.finish();
  }

  // The same for rows [begin, end) of one slot, which read each tile of columns together.
  template <int G>
  void together(int64_t begin, int64_t end, int64_t head, int64_t first) const {
    const int64_t d = pages.d, length = *std::max_element(positions + begin, positions + end) + 1;
    std::vector<Heads<G>> mine;
    mine.reserve(end - begin);
    for (int64_t row = begin, at; row < end; row++)
      at = (row * heads + first) * d, mine.emplace_back(q + at, out + at, d, scale);
    std::vector<float> columns(d * kTile), rows(kTile * d);
    for (int64_t from = 0; from < length; from += kTile) {
      const int64_t count = std::min(kTile, length - from), place = pages.at(slots[begin], head, from);
      for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < d; i += 8) {
          const Floats key = load(keys + place + t * d + i);
          for (int j = 0; j < 8; j++) columns[(i + j) * kTile + t] = key[j];
          store(&rows[t * d + i], load(values + place + t * d + i));
        }
      for (int64_t row = begin; row < end; row++) {
        const int64_t seen = std::min(count, positions[row] + 1 - from);
        if (seen <= 0) continue;
        Heads<G>& one = mine[row - begin];
        one.score_columns(columns.data());
        one.normalise(seen);
        one.gather(rows.data(), seen);
      }
    }
    for (Heads<G>& one : mine) one.finish();
  }

  template <int G>
  void some_heads(int64_t begin, int64_t end, int64_t head, int64_t first) const {
    end - begin == 1 ? alone<G>(begin, head, first) : together<G>(begin, end, head, first);
  }

  void run(int64_t begin, int64_t end, int64_t head) const {
    for (int64_t g = 0; g < group; g += 4) {
      const int64_t first = head * group + g;
      switch (std::min<int64_t>(group - g, 4)) {
        case 1: some_heads<1>(begin, end, head, first); break;
        case 2: some_heads<2>(begin, end, head, first); break;
        case 3: some_heads<3>(begin, end, head, first); break;
        default: some_heads<4>(begin, end, head, first);
      }
    }
  }
};

template <typename T>
void attend_rows(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& slot, const Tensor& position,
                 float scale, const Tensor& result) {
  const Pages pages(keys);
  const int64_t rows = q.size(0), heads = q.size(1);
  const Call<T> call{pages, heads, heads / pages.heads, static_cast<const float*>(q.data_ptr()),
                     static_cast<const T*>(keys.data_ptr()), static_cast<const T*>(values.data_ptr()),
                     static_cast<const int64_t*>(slot.data_ptr()), static_cast<const int64_t*>(position.data_ptr()),
                     scale, static_cast<float*>(result.data_ptr())};
  std::vector<int64_t> runs{0};  // where each begins; rows of one slot that follow each other
  for (int64_t row = 1; row < rows; row++)
    if (call.slots[row] != call.slots[row - 1] || row - runs.back() == kRun) runs.push_back(row);
  const int64_t count = runs.size();
  runs.push_back(rows);
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < count * pages.heads; task++)
    call.run(runs[task / pages.heads], runs[task / pages.heads + 1], task % pages.heads);
}

// q float32 [rows, heads, d], d a multiple of 16; keys, values [pages, slots, kv_heads, size, d] in float32 or
// bfloat16, size a multiple of 64; slot, position int64 [rows]: row i sees columns 0 to position[i] of slot[i]
// -> float32 [rows, heads, d].
Tensor attend(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& slot, const Tensor& position,
              double scale) {
  Tensor result = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const auto run = keys.element_size() == 2 ? attend_rows<uint16_t> : attend_rows<float>;
  run(q, keys, values, slot, position, static_cast<float>(scale), result);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slots, m) {
  m.def("attend(Tensor q, Tensor keys, Tensor values, Tensor slot, Tensor position, float scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(slots, CPU, m) { m.impl("attend", TORCH_BOX(&attend)); }
