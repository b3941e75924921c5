// Rows times a matrix of 4-bit (or 7-bit) weights, with int8 activations: slots::packed_product.
//
// Knows no model and no bitsandbytes: packed.py lays the weights out. A row of the result depends on that row of the
// input alone, its sums taken in the same order whatever the number of rows and threads: nobody's neighbours show in
// their text, not in one bit.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "vectors.h"

using torch::stable::Tensor;

namespace {

constexpr int64_t kLanes = 8;   // output rows that share a vector, one int32 lane each
constexpr int64_t kBlock = 64;  // inputs that share a scale: bitsandbytes' block, and ours for activations
constexpr int64_t kPanel = 64;  // input rows that are computed together: as int8 they fit the second-level cache
constexpr int kOffset = 64;     // added to weights in [-63, 63]: u8 x s8 pairs then fit 16 bits (2 * 127 * 127)

// Activations of a panel: int8 in [-127, 127], a scale a block, and what undoes the weights' offset.
struct Panel {
  int64_t k, blocks = k / kBlock;
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> undo;

  Panel(int64_t rows, int64_t width) : k(width), q(rows * k), scale(rows * blocks), undo(rows * blocks) {}

  void quantise(int64_t row, const float* x) {
    for (int64_t b = 0; b < blocks; b++, x += kBlock) {
      float top = 0;
      int unsound = 0;  // NaN or infinity, which int8 cannot say: the scale does
      for (int i = 0; i < kBlock; i++) {
        const float size = std::fabs(x[i]);
        unsound |= !(size <= 3e38f);
        top = size > top ? size : top;
      }
      const float inverse = top > 0 && !unsound ? 127 / top : 0;
      int8_t* to = &q[row * k + b * kBlock];
      int32_t sum = 0;
      for (int i = 0; i < kBlock; i++) {
        const auto v = static_cast<int32_t>(std::nearbyint(unsound ? 0 : x[i] * inverse));
        to[i] = static_cast<int8_t>(v);
        sum += v;
      }
      scale[row * blocks + b] = unsound ? NAN : top / 127;
      undo[row * blocks + b] = -kOffset * sum;
    }
  }
};

// sums + products of four u8 x s8 pairs in each lane.
inline __m256i dot4(__m256i sums, __m256i u8, __m256i s8) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpbusd_epi32(sums, u8, s8);
#else
  return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(u8, s8), _mm256_set1_epi16(1)));
#endif
}

// M input rows from `row` on, times kLanes output rows.
// weights [blocks][kBlock / 4][kLanes][4]; scales bfloat16 [blocks][kLanes].
template <int M>
void tile(const Panel& x, int64_t row, const __m256i* weights, const uint16_t* scales, float* out, int64_t stride) {
  const int8_t* q = &x.q[row * x.k];
  const float* scale = &x.scale[row * x.blocks];
  const int32_t* undo = &x.undo[row * x.blocks];
  Floats total[M] = {};
  for (int64_t b = 0; b < x.blocks; b++, q += kBlock, weights += kBlock / 4) {
    __m256i sums[M];
    for (int m = 0; m < M; m++) sums[m] = _mm256_set1_epi32(undo[m * x.blocks + b]);
#pragma GCC unroll 4
    for (int i = 0; i < kBlock / 4; i++)
      for (int m = 0; m < M; m++) {
        int32_t four;
        std::memcpy(&four, q + m * x.k + 4 * i, 4);
        sums[m] = dot4(sums[m], weights[i], _mm256_set1_epi32(four));
      }
    const Floats by = load(scales + b * kLanes);
    for (int m = 0; m < M; m++)
      total[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m]), by * scale[m * x.blocks + b], total[m]);
  }
  for (int m = 0; m < M; m++) store(out + m * stride, total[m]);
}

// 4-bit codes -> the bytes that `tile` reads: low halves are one group of four inputs, high halves the next.
void expand(const __m256i* packed, __m256i codebook, int64_t vectors, __m256i* weights) {
  const __m256i low = _mm256_set1_epi8(15);
  for (int64_t i = 0; i < vectors; i++) {
    weights[2 * i] = _mm256_shuffle_epi8(codebook, _mm256_and_si256(packed[i], low));
    weights[2 * i + 1] = _mm256_shuffle_epi8(codebook, _mm256_and_si256(_mm256_srli_epi16(packed[i], 4), low));
  }
}

// x float32 [m, k]; weights uint8 [n / 8, k / 64, 512, or 256 of two codes]; scales bfloat16 [n / 8, k / 64, 8];
// codebook uint8 [16] for 4-bit weights, else empty -> float32 [m, n]. The caller sees to shapes and alignment (32).
Tensor packed_product(const Tensor& x, const Tensor& weights, const Tensor& scales, const Tensor& codebook) {
  const int64_t m = x.size(0), k = x.size(1), groups = scales.size(0), n = groups * kLanes;
  const bool packed = codebook.numel() > 0;
  const int64_t vectors = k * kLanes / 32 / (packed ? 2 : 1);
  const auto* in = static_cast<const float*>(x.data_ptr());
  const auto* all = static_cast<const __m256i*>(weights.data_ptr());
  const auto* scale = static_cast<const uint16_t*>(scales.data_ptr());
  const auto* codes = static_cast<const __m128i*>(codebook.data_ptr());
  const __m256i table = packed ? _mm256_broadcastsi128_si256(_mm_loadu_si128(codes)) : __m256i{};
  Tensor result = torch::stable::new_empty(x, {m, n});
  auto* out = static_cast<float*>(result.data_ptr());
  Panel panel(std::min(m, kPanel), k);
#pragma omp parallel
  for (int64_t first = 0; first < m; first += kPanel) {
    const int64_t rows = std::min(kPanel, m - first);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) panel.quantise(r, in + (first + r) * k);
    thread_local std::vector<__m256i> expanded;
    if (packed) expanded.resize(2 * vectors);
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; g++) {
      const __m256i* mine = all + g * vectors;
      if (packed) expand(mine, table, vectors, expanded.data()), mine = expanded.data();
      const uint16_t* by = scale + g * k / kBlock * kLanes;
      float* to = out + first * n + g * kLanes;
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) tile<4>(panel, r, mine, by, to + r * n, n);
      for (; r < rows; r++) tile<1>(panel, r, mine, by, to + r * n, n);
    }
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slots, m) {
  m.def("packed_product(Tensor x, Tensor weights, Tensor scales, Tensor codebook) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(slots, CPU, m) { m.impl("packed_product", TORCH_BOX(&packed_product)); }
