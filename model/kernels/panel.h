// Input rows as int8, for product.cpp. Knows nothing of the matrix that they are multiplied by.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t kBlock = 64;  // inputs that share a scale: bitsandbytes' block, and ours for activations
constexpr int kOffset = 64;     // added to weights in [-63, 63]: u8 x s8 pairs then fit 16 bits (2 * 127 * 127)

// Activations of a panel: int8 in [-127, 127], a scale a block, and what undoes the weights' offset.
struct Panel {
  int64_t k, blocks;
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> undo;

  // Room for `rows` of `width`; grows and is kept, for a step has a hundred products.
  void fit(int64_t rows, int64_t width) {
    k = width, blocks = k / kBlock;
    q.resize(std::max<size_t>(q.size(), rows * k));
    scale.resize(std::max<size_t>(scale.size(), rows * blocks));
    undo.resize(scale.size());
  }

  void quantise(int64_t row, const float* x) {
    for (int64_t b = 0; b < blocks; b++, x += kBlock) {
      Floats tops = {}, unsound = {};  // NaN where x is NaN or infinite, which int8 cannot say: the scale does
      for (int i = 0; i < kBlock; i += 8) {
        const Floats v = load(x + i);
        tops = _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v), tops);
        unsound += v * 0.0f;
      }
      const float top = largest(tops), inverse = 127 / std::max(top, 1e-30f);
      __m256i sums = _mm256_setzero_si256();
      for (int i = 0; i < kBlock; i += 32) {
        __m256i v[4];
        for (int j = 0; j < 4; j++) {
          v[j] = _mm256_cvtps_epi32(load(x + i + 8 * j) * inverse);  // to the nearest, halves to even
          sums = _mm256_add_epi32(sums, v[j]);
        }
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works in halves
        auto* to = reinterpret_cast<__m256i*>(&q[row * k + b * kBlock + i]);
        _mm256_storeu_si256(to, _mm256_permutevar8x32_epi32(bytes, order));
      }
      scale[row * blocks + b] = top / 127 + sum(unsound);
      undo[row * blocks + b] = -kOffset * static_cast<int32_t>(sum(_mm256_cvtepi32_ps(sums)));
    }
  }
};

}  // namespace
