// Rows times a matrix of 4-bit (or 7-bit) weights, with int8 activations: slots::packed_product, and slots::layer, a
// decoder layer of such matrices; and slots::set_threads of all kernels.
//
// linear.py lays the weights out. A row of a product depends on that row of the input alone, its sums taken in the same
// order whatever the number of rows and threads: no text depends on its neighbours, not in one bit.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "panel.h"
#include "rows.h"

using torch::stable::Tensor;

namespace {

constexpr int64_t kLanes = 8;   // output rows that share a vector, one int32 lane each
constexpr int64_t kPanel = 64;  // input rows that are computed together: as int8 they fit the second-level cache
constexpr int64_t kChunk = 8;   // fewest groups of lanes given to a thread at once: one that is held up gets fewer
constexpr int64_t kDirect = 4;  // input rows up to which codes are looked up on the way, not once for all

// sums + products of four u8 x s8 pairs in each lane.
inline __m256i dot4(__m256i sums, __m256i u8, const int8_t* four) {
  int32_t s8;
  std::memcpy(&s8, four, 4);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpbusd_epi32(sums, u8, _mm256_set1_epi32(s8));
#else
  const __m256i pairs = _mm256_maddubs_epi16(u8, _mm256_set1_epi32(s8));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

// Weights as bytes, a vector of four inputs for each lane.
struct Bytes {
  static constexpr int kVectors = kBlock / 4;  // in a block
  static constexpr int kParts = 1;             // groups of four inputs in one vector

  void take(const __m256i* from, __m256i* parts) const { parts[0] = *from; }
};

// Weights as codes of 4 bits: low halves are one group of four inputs, high halves the next.
struct Codes {
  static constexpr int kVectors = kBlock / 8;
  static constexpr int kParts = 2;
  // NF4's sixteen values (Dettmers et al., QLoRA, 2023, appendix E) in steps of 1/63, with the offset.
  __m256i codebook = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(1, 20, 31, 39, 46, 52, 58, 64, 69, 74, 80, 85, 92, 99, 110, 127));

  void take(const __m256i* from, __m256i* parts) const {
    const __m256i low = _mm256_set1_epi8(15), both = *from;
    parts[0] = _mm256_shuffle_epi8(codebook, _mm256_and_si256(both, low));
    parts[1] = _mm256_shuffle_epi8(codebook, _mm256_and_si256(_mm256_srli_epi16(both, 4), low));
  }
};

// Where a product goes: rows of `stride` floats, to which those of `add` are added (all the same one where its stride is 0).
struct Output {
  float* to;
  int64_t stride;
  const float* add = nullptr;
  int64_t add_stride = 0;

  Output at(int64_t row, int64_t column) const {
    return {to + row * stride + column, stride, add ? add + row * add_stride + column : nullptr, add_stride};
  }
};

// M input rows from `row` on, times kLanes output rows.
// weights [blocks][W::kVectors] vectors; scales bfloat16 [blocks][kLanes].
template <int M, typename W>
void tile(const W& kind, const Panel& x, int64_t row, const __m256i* weights, const uint16_t* scales,
          const Output& out) {
  const int8_t* q = &x.q[row * x.k];
  const float* scale = &x.scale[row * x.blocks];
  const int32_t* undo = &x.undo[row * x.blocks];
  Floats total[M] = {};
  for (int64_t b = 0; b < x.blocks; b++, weights += W::kVectors) {
    __m256i sums[M];
    for (int m = 0; m < M; m++) sums[m] = _mm256_set1_epi32(undo[m * x.blocks + b]);
#pragma GCC unroll 4
    for (int i = 0; i < W::kVectors; i++) {
      __m256i parts[W::kParts];
      kind.take(weights + i, parts);
      for (int part = 0; part < W::kParts; part++, q += 4)
        for (int m = 0; m < M; m++) sums[m] = dot4(sums[m], parts[part], q + m * x.k);
    }
    const Floats by = load(scales + b * kLanes);
    for (int m = 0; m < M; m++)
      total[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m]), by * scale[m * x.blocks + b], total[m]);
  }
  for (int m = 0; m < M; m++)
    store(out.to + m * out.stride, out.add ? total[m] + load(out.add + m * out.add_stride) : total[m]);
}

// All rows of a panel times kLanes output rows.
template <typename W>
void column(const W& kind, const Panel& x, int64_t rows, const __m256i* weights, const uint16_t* scales,
            const Output& out) {
  for (int64_t row = 0; row < rows; row += 4) switch (std::min<int64_t>(rows - row, 4)) {
      case 1: tile<1>(kind, x, row, weights, scales, out.at(row, 0)); break;
      case 2: tile<2>(kind, x, row, weights, scales, out.at(row, 0)); break;
      case 3: tile<3>(kind, x, row, weights, scales, out.at(row, 0)); break;
      default: tile<4>(kind, x, row, weights, scales, out.at(row, 0));
    }
}

// The same for codes; many rows read them as bytes, which this makes once for all.
void column(const Codes& kind, const Panel& x, int64_t rows, const __m256i* codes, const uint16_t* scales,
            const Output& out) {
  if (rows <= kDirect) return column<Codes>(kind, x, rows, codes, scales, out);
  thread_local std::vector<__m256i> bytes;
  const int64_t vectors = x.blocks * Codes::kVectors;
  bytes.resize(vectors * Codes::kParts);
  for (int64_t i = 0; i < vectors; i++) kind.take(codes + i, &bytes[i * Codes::kParts]);
  column(Bytes(), x, rows, bytes.data(), scales, out);
}

// A matrix as linear.py lays it out, uint8 [n / 8, bytes]. In memory first the weights of all groups of eight rows
// ([k / 64] blocks of 512 bytes each, or of 256 where there are two codes in a byte), then their scales (bfloat16
// [k / 64, 8] each): two streams, for side by side in a page they hide each other from the processor's prefetching (a
// quarter slower at one row).
class Matrix {
 public:
  Matrix(const Tensor& matrix, int64_t width)
      : k(width), groups(matrix.size(0)), codes(matrix.size(1) < k * kLanes), data(matrix.data_ptr()) {}

  int64_t rows() const { return groups * kLanes; }

  // All rows of a panel, of k columns -> out float32 [rows of the panel, rows()].
  void times(const Panel& x, int64_t count, const Output& out) const {
    codes ? times(Codes(), x, count, out) : times(Bytes(), x, count, out);
  }

  const int64_t k;

 private:
  template <typename W>
  void times(const W& kind, const Panel& x, int64_t count, const Output& out) const {
    const int64_t size = x.blocks * W::kVectors;
    const auto* weights = static_cast<const __m256i*>(data);
    const auto* scales = reinterpret_cast<const uint16_t*>(weights + groups * size);
    each(groups, kChunk, [&](int64_t g) {
      column(kind, x, count, weights + g * size, scales + g * x.blocks * kLanes, out.at(0, g * kLanes));
    });
  }

  const int64_t groups;
  const bool codes;
  const void* data;
};

// Root mean square normalisation (Zhang and Sennrich, 2019) of a row of k floats, k a multiple of 64.
struct Norm {
  const float* weight = nullptr;  // none: rows are taken as they are
  float epsilon = 0;

  const float* operator()(const float* x, int64_t k) const {
    if (!weight) return x;
    thread_local std::vector<float> made;
    made.resize(std::max<size_t>(made.size(), k));
    Floats squares = {};
    for (int64_t i = 0; i < k; i += 8) squares = fused(load(x + i), load(x + i), squares);
    const float by = 1 / std::sqrt(sum(squares) / k + epsilon);
    for (int64_t i = 0; i < k; i += 8) store(&made[i], load(x + i) * by * load(weight + i));
    return made.data();
  }
};

const float* floats(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }

// x float32 [m, k], matrix of k columns -> float32 [m, its rows]: x, normalised where `norm` [k] is given, times the
// matrix, plus `add` [m or 1, its rows] where that is given. The caller sees to shapes and alignment (32).
Tensor product(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& norm, double epsilon,
               const std::optional<Tensor>& add) {
  thread_local Panel own;
  Panel& panel = own;  // the caller's, for all threads
  const Matrix matrix(packed, x.size(1));
  const Norm normal{norm ? floats(*norm) : nullptr, static_cast<float>(epsilon)};
  const int64_t m = x.size(0), k = matrix.k, n = matrix.rows();
  Tensor result = empty(x, m, n);
  const float* in = floats(x);
  const Output out{static_cast<float*>(result.data_ptr()), n, add ? floats(*add) : nullptr,
                   add && add->size(0) > 1 ? n : 0};
  panel.fit(std::min(m, kPanel), k);
  for (int64_t first = 0; first < m; first += kPanel) {
    const int64_t count = std::min(kPanel, m - first);
    each(count, kFew, [&](int64_t r) { panel.quantise(r, normal(in + (first + r) * k, k)); });
    matrix.times(panel, count, out.at(first, 0));
  }
  return result;
}

Tensor packed_product(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& norm, double epsilon) {
  return product(x, packed, norm, epsilon, std::nullopt);
}

// gate[i] = silu(gate[i]) * up[i], where silu(x) = x / (1 + e^-x); n is a multiple of 8.
void gated(float* gate, const float* up, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    const Floats x = load(gate + i), shrunk = exponential(x > 0.0f ? -x : x);
    store(gate + i, x * (x > 0.0f ? Floats{} + 1.0f : shrunk) / (1.0f + shrunk) * load(up + i));
  }
}

// x float32 [m, k]; gate_up of k columns and twice as many rows as down, of k rows, has columns -> float32 [m, k]:
// x + down(silu(gate(y)) * up(y)) (Shazeer, GLU Variants Improve Transformer, 2020), y being x normalised.
Tensor feed_forward(const Tensor& x, const Tensor& gate_up, const Tensor& down, const Tensor& norm, double epsilon) {
  thread_local Panel own[2];
  thread_local std::vector<float> inner;
  Panel &outside = own[0], &inside = own[1];
  const Matrix widen(gate_up, x.size(1)), narrow(down, widen.rows() / 2);
  const Norm normal{floats(norm), static_cast<float>(epsilon)};
  const int64_t m = x.size(0), k = widen.k, width = narrow.k;
  Tensor result = empty(x, m, k);
  const float* in = floats(x);
  const Output out{static_cast<float*>(result.data_ptr()), k, in, k};
  outside.fit(std::min(m, kPanel), k), inside.fit(std::min(m, kPanel), width);
  inner.resize(std::max<size_t>(inner.size(), std::min(m, kPanel) * 2 * width));
  float* const middle = inner.data();
  for (int64_t first = 0; first < m; first += kPanel) {
    const int64_t count = std::min(kPanel, m - first);
    each(count, kFew, [&](int64_t r) { outside.quantise(r, normal(in + (first + r) * k, k)); });
    widen.times(outside, count, Output{middle, 2 * width});
    each(count, kFew, [&](int64_t r) {
      float* gate = middle + r * 2 * width;
      gated(gate, gate + width, width);
      inside.quantise(r, gate);
    });
    narrow.times(inside, count, out.at(first, 0));
  }
  return result;
}

// Normalises each of a row's first heads of `weight`'s width, in place.
void normalise_heads(float* row, const Tensor& weight, int64_t heads, double epsilon) {
  const Norm norm{floats(weight), static_cast<float>(epsilon)};
  for (const int64_t d = weight.size(0); heads--; row += d) std::copy_n(norm(row, d), d, row);
}

// A decoder layer of Llama, Qwen2 (with `bias` [1, rows of wide]) or Qwen3 (with `query` and `key` norms [d]): x float32
// [m, k] -> float32 [m, k]. first, second float32 [k]: norms before attention and before the feed-forward part; wide, out,
// gate_up, down: matrices; the rest as in attend. One call, because each costs 5 to 11 us and a step has a layer 30 times.
Tensor layer(const Tensor& x, const Tensor& cos, const Tensor& sin, Tensor keys, Tensor values, const Tensor& tables,
             const Tensor& tokens, double scale, double epsilon, const Tensor& first, const Tensor& second,
             const Tensor& wide, const Tensor& out, const Tensor& gate_up, const Tensor& down,
             const std::optional<Tensor>& bias, const std::optional<Tensor>& query, const std::optional<Tensor>& key) {
  const Tensor qkv = product(x, wide, first, epsilon, bias);
  if (query && key) {
    const int64_t width = qkv.size(1), d = key->size(0), groups = keys.size(1), heads = width / d - 2 * groups;
    each(qkv.size(0), kFew, [&](int64_t r) {
      float* row = static_cast<float*>(qkv.data_ptr()) + r * width;
      normalise_heads(row, *query, heads, epsilon);
      normalise_heads(row + heads * d, *key, groups, epsilon);
    });
  }
  const Tensor attended = attend(qkv, cos, sin, keys, values, tables, tokens, scale);
  return feed_forward(product(attended, out, std::nullopt, 0, x), gate_up, down, second, epsilon);
}

void set_threads(int64_t count) { Pool::shared().resize(count); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slots, m) {
  m.def("packed_product(Tensor x, Tensor matrix, Tensor? norm=None, float epsilon=0) -> Tensor");
  m.def(
      "layer(Tensor x, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor tables, Tensor tokens, "
      "float scale, float epsilon, Tensor first, Tensor second, Tensor wide, Tensor out, Tensor gate_up, "
      "Tensor down, Tensor? bias, Tensor? query, Tensor? key) -> Tensor");
  m.def("set_threads(int count) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(slots, CPU, m) {
  m.impl("packed_product", TORCH_BOX(&packed_product));
  m.impl("layer", TORCH_BOX(&layer));
}
STABLE_TORCH_LIBRARY_IMPL(slots, CompositeExplicitAutograd, m) { m.impl("set_threads", TORCH_BOX(&set_threads)); }
