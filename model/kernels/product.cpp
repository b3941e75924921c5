// Rows times a matrix of 4-bit (or 7-bit) weights, with int8 activations: slots::packed_product, and slots::feed_forward
// of two such matrices.
//
// Knows no model and no bitsandbytes: packed.py lays the weights out. A row of the result depends on that row of the
// input alone, its sums taken in the same order whatever the number of rows and threads: nobody's neighbours show in
// their text, not in one bit.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
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

// M input rows from `row` on, times kLanes output rows.
// weights [blocks][W::kVectors] vectors; scales bfloat16 [blocks][kLanes].
template <int M, typename W>
void tile(const W& kind, const Panel& x, int64_t row, const __m256i* weights, const uint16_t* scales, float* out,
          int64_t stride) {
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
  for (int m = 0; m < M; m++) store(out + m * stride, total[m]);
}

// All rows of a panel times kLanes output rows.
template <typename W>
void column(const W& kind, const Panel& x, int64_t rows, const __m256i* weights, const uint16_t* scales, float* out,
            int64_t stride) {
  for (int64_t row = 0; row < rows; row += 4, out += 4 * stride) switch (std::min<int64_t>(rows - row, 4)) {
      case 1: tile<1>(kind, x, row, weights, scales, out, stride); break;
      case 2: tile<2>(kind, x, row, weights, scales, out, stride); break;
      case 3: tile<3>(kind, x, row, weights, scales, out, stride); break;
      default: tile<4>(kind, x, row, weights, scales, out, stride);
    }
}

// The same for codes; many rows read them as bytes, which this makes once for all.
void column(const Codes& kind, const Panel& x, int64_t rows, const __m256i* codes, const uint16_t* scales, float* out,
            int64_t stride) {
  if (rows <= kDirect) return column<Codes>(kind, x, rows, codes, scales, out, stride);
  thread_local std::vector<__m256i> bytes;
  const int64_t vectors = x.blocks * Codes::kVectors;
  bytes.resize(vectors * Codes::kParts);
  for (int64_t i = 0; i < vectors; i++) kind.take(codes + i, &bytes[i * Codes::kParts]);
  column(Bytes(), x, rows, bytes.data(), scales, out, stride);
}

// A matrix as packed.py lays it out, uint8 [n / 8, bytes]. In memory first the weights of all groups of eight rows
// ([k / 64] blocks of 512 bytes each, or of 256 where there are two codes in a byte), then their scales (bfloat16
// [k / 64, 8] each): two streams, for side by side in a page they hide each other from the processor's prefetching (a
// quarter slower at one row).
class Matrix {
 public:
  Matrix(const Tensor& matrix, int64_t width)
      : k(width), groups(matrix.size(0)), codes(matrix.size(1) < k * kLanes), data(matrix.data_ptr()) {}

  int64_t rows() const { return groups * kLanes; }

  // All rows of a panel, of k columns -> out float32 [rows of the panel, rows()].
  void times(const Panel& x, int64_t count, float* out) const {
    codes ? times(Codes(), x, count, out) : times(Bytes(), x, count, out);
  }

  const int64_t k;

 private:
  template <typename W>
  void times(const W& kind, const Panel& x, int64_t count, float* out) const {
    const int64_t each = x.blocks * W::kVectors;
    const auto* weights = static_cast<const __m256i*>(data);
    const auto* scales = reinterpret_cast<const uint16_t*>(weights + groups * each);
#pragma omp parallel for schedule(guided, kChunk)
    for (int64_t g = 0; g < groups; g++)
      column(kind, x, count, weights + g * each, scales + g * x.blocks * kLanes, out + g * kLanes, rows());
  }

  const int64_t groups;
  const bool codes;
  const void* data;
};

// x float32 [m, k], matrix of k columns -> float32 [m, its rows]. The caller sees to shapes and alignment (32).
Tensor packed_product(const Tensor& x, const Tensor& packed) {
  thread_local Panel own;
  Panel& panel = own;  // the caller's, for all threads
  const Matrix matrix(packed, x.size(1));
  const int64_t m = x.size(0), k = matrix.k, n = matrix.rows();
  Tensor result = torch::stable::new_empty(x, {m, n});
  const auto* in = static_cast<const float*>(x.data_ptr());
  auto* out = static_cast<float*>(result.data_ptr());
  panel.fit(std::min(m, kPanel), k);
  for (int64_t first = 0; first < m; first += kPanel) {
    const int64_t count = std::min(kPanel, m - first);
    each_row(count, [&](int64_t r) { panel.quantise(r, in + (first + r) * k); });
    matrix.times(panel, count, out + first * n);
  }
  return result;
}

// gate[i] = silu(gate[i]) * up[i], where silu(x) = x / (1 + e^-x); n is a multiple of 8.
void gated(float* gate, const float* up, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    const Floats x = load(gate + i), shrunk = exponential(x > 0.0f ? -x : x);
    store(gate + i, x * (x > 0.0f ? Floats{} + 1.0f : shrunk) / (1.0f + shrunk) * load(up + i));
  }
}

// x float32 [m, k]; gate_up of k columns and twice as many rows as down has columns -> float32 [m, rows of down]:
// down(silu(gate(x)) * up(x)) (Shazeer, GLU Variants Improve Transformer, 2020), a call instead of three.
Tensor feed_forward(const Tensor& x, const Tensor& gate_up, const Tensor& down) {
  thread_local Panel own[2];
  thread_local std::vector<float> inner;
  Panel &outside = own[0], &inside = own[1];
  const Matrix widen(gate_up, x.size(1)), narrow(down, widen.rows() / 2);
  const int64_t m = x.size(0), k = widen.k, width = narrow.k, n = narrow.rows();
  Tensor result = torch::stable::new_empty(x, {m, n});
  const auto* in = static_cast<const float*>(x.data_ptr());
  auto* out = static_cast<float*>(result.data_ptr());
  outside.fit(std::min(m, kPanel), k), inside.fit(std::min(m, kPanel), width);
  inner.resize(std::max<size_t>(inner.size(), std::min(m, kPanel) * 2 * width));
  float* const middle = inner.data();
  for (int64_t first = 0; first < m; first += kPanel) {
    const int64_t count = std::min(kPanel, m - first);
    each_row(count, [&](int64_t r) { outside.quantise(r, in + (first + r) * k); });
    widen.times(outside, count, middle);
    each_row(count, [&](int64_t r) {
      float* gate = middle + r * 2 * width;
      gated(gate, gate + width, width);
      inside.quantise(r, gate);
    });
    narrow.times(inside, count, out + first * n);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slots, m) {
  m.def("packed_product(Tensor x, Tensor matrix) -> Tensor");
  m.def("feed_forward(Tensor x, Tensor gate_up, Tensor down) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(slots, CPU, m) {
  m.impl("packed_product", TORCH_BOX(&packed_product));
  m.impl("feed_forward", TORCH_BOX(&feed_forward));
}
