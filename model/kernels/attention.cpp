// One token a row: its KV is written to its sequence's blocks, and its queries attend up to its own position:
// slots::attend.
//
// A row costs what its own length costs, whatever the longest is, and has the same bits in any batch: the tokens of one
// prompt share the work of reading their columns, but each sums in the order of a token alone.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "heads.h"
#include "rows.h"

using torch::stable::Tensor;

namespace {

constexpr int64_t kRun = 32;  // most tokens of one prompt that are computed together

// Where KV lies: keys (or values) [blocks, heads, size, d], tables int32 [sequences, width].
struct Blocks {
  int64_t heads, size, d, width;
  const int32_t* tables;

  Blocks(const Tensor& keys, const Tensor& table)
      : heads(keys.size(1)), size(keys.size(2)), d(keys.size(3)), width(table.size(1)),
        tables(static_cast<const int32_t*>(table.data_ptr())) {}

  // The first element of a column; columns up to the end of its block follow.
  int64_t at(int64_t sequence, int64_t head, int64_t column) const {
    const int64_t block = tables[sequence * width + column / size];
    return ((block * heads + head) * size + column % size) * d;
  }
};

// What all tasks read. T: float, or uint16_t for bfloat16.
template <typename T>
struct Call {
  Blocks blocks;
  int64_t heads, group;
  const float* q;
  const T *keys, *values;
  const int64_t *sequences, *positions;
  float scale;
  float* out;

  // The single token of a row, for G of the query heads that share a KV head.
  template <int G>
  void alone(int64_t row, int64_t head, int64_t first) const {
    const int64_t at = (row * heads + first) * blocks.d, length = positions[row] + 1;
    Heads<G> mine(q + at, out + at, blocks.d, scale);
    for (int64_t begin = 0; begin < length; begin += kTile) {
      const int64_t count = std::min(kTile, length - begin), place = blocks.at(sequences[row], head, begin);
      mine.score(keys + place, count);
      mine.normalise(count);
      mine.gather(values + place, count);
    }
    mine.finish();
  }

  // The same for rows [begin, end) of one sequence, which read each tile of columns together.
  template <int G>
  void together(int64_t begin, int64_t end, int64_t head, int64_t first) const {
    const int64_t d = blocks.d, length = *std::max_element(positions + begin, positions + end) + 1;
    std::vector<Heads<G>> mine;
    mine.reserve(end - begin);
    for (int64_t row = begin, at; row < end; row++)
      at = (row * heads + first) * d, mine.emplace_back(q + at, out + at, d, scale);
    std::vector<float> columns(d * kTile), rows(kTile * d);
    for (int64_t from = 0; from < length; from += kTile) {
      const int64_t count = std::min(kTile, length - from), place = blocks.at(sequences[begin], head, from);
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

// Rotary position embedding (Su et al., RoFormer, 2021) of one head, its halves paired as in Llama. T as in Call.
template <typename T>
void rotate(const float* x, const float* cos, const float* sin, int64_t d, T* out) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; i += 8) {
    const Floats low = load(x + i), high = load(x + half + i);
    store(out + i, fused(low, load(cos + i), -(high * load(sin + i))));
    store(out + half + i, fused(high, load(cos + half + i), low * load(sin + half + i)));
  }
}

// Runs of rows of one sequence: where each begins, and the end.
std::vector<int64_t> runs_of(const int64_t* sequences, int64_t rows) {
  std::vector<int64_t> runs{0};
  for (int64_t row = 1; row < rows; row++)
    if (sequences[row] != sequences[row - 1] || row - runs.back() == kRun) runs.push_back(row);
  runs.push_back(rows);
  return runs;
}

template <typename T>
void attend_rows(const float* qkv, const float* cos, const float* sin, T* keys, T* values, const Call<T>& call,
                 float* queries, int64_t rows) {
  const Blocks& blocks = call.blocks;
  const int64_t d = blocks.d, heads = call.heads, width = (heads + 2 * blocks.heads) * d;
  each(rows, kFew, [&](int64_t row) {
    const float *x = qkv + row * width, *c = cos + row * d, *s = sin + row * d;
    for (int64_t head = 0; head < heads; head++, x += d) rotate(x, c, s, d, queries + (row * heads + head) * d);
    for (int64_t head = 0; head < blocks.heads; head++, x += d) {
      const int64_t place = blocks.at(call.sequences[row], head, call.positions[row]);
      rotate(x, c, s, d, keys + place);
      for (int64_t i = 0; i < d; i += 8) store(values + place + i, load(x + blocks.heads * d + i));
    }
  });
  const std::vector<int64_t> runs = runs_of(call.sequences, rows);
  const int64_t count = runs.size() - 1;
  each(count * blocks.heads, 1, [&](int64_t task) {
    call.run(runs[task / blocks.heads], runs[task / blocks.heads + 1], task % blocks.heads);
  });
}

}  // namespace

// qkv float32 [rows, (heads + 2 kv_heads) * d], d a multiple of 16: a token's queries, keys and values; cos, sin float32
// [rows, d]; keys, values [blocks, kv_heads, size, d] in float32 or bfloat16, size a multiple of 64; tables, tokens as in
// kv.Batch. The KV of all rows is written first; then each sees the columns up to its own -> float32 [rows, heads * d].
Tensor attend(const Tensor& qkv, const Tensor& cos, const Tensor& sin, Tensor keys, Tensor values, const Tensor& tables,
              const Tensor& tokens, double scale) {
  thread_local std::vector<float> queries;
  const Blocks blocks(keys, tables);
  const int64_t rows = qkv.size(0), heads = qkv.size(1) / blocks.d - 2 * blocks.heads;
  Tensor result = empty(qkv, rows, heads * blocks.d);
  queries.resize(std::max<size_t>(queries.size(), rows * heads * blocks.d));
  const auto floats = [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
  const auto* facts = static_cast<const int64_t*>(tokens.data_ptr());
  const auto run = [&]<typename T>(T* k, T* v) {
    const Call<T> call{blocks, heads, heads / blocks.heads, queries.data(), k, v,
                       facts + 3 * rows, facts + rows, static_cast<float>(scale), floats(result)};
    attend_rows(floats(qkv), floats(cos), floats(sin), k, v, call, queries.data(), rows);
  };
  if (keys.element_size() == 2)
    run(static_cast<uint16_t*>(keys.data_ptr()), static_cast<uint16_t*>(values.data_ptr()));
  else
    run(floats(keys), floats(values));
  return result;
}

STABLE_TORCH_LIBRARY_FRAGMENT(slots, m) {
  m.def(
      "attend(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor tables, Tensor tokens, "
      "float scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(slots, CPU, m) { m.impl("attend", TORCH_BOX(&attend)); }
