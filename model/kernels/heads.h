// Softmax attention of a few query heads, for attention.cpp: in one pass over the columns, a tile at a time (Milakov and
// Gimelshein, 2018). Knows nothing of blocks.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace {

constexpr int64_t kTile = 64;  // columns whose scores are held at once; divides a block

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
        for (int g = 0; g < G; g++) sums[g] = fused(key, load(q + g * d + i), sums[g]);
      }
      for (int g = 0; g < G; g++) weight[g][t] = sum(sums[g]) * scale;
    }
  }

  // As above to the bit, from a tile of keys that lie [d][kTile], eight columns to a vector: no sums across lanes. What
  // is one lane's there is summed by itself here, and the eight of them in the order of `sum`.
  void score_columns(const float* keys) {
    for (int64_t c = 0; c < kTile; c += 32) {
      Floats lanes[8][G][4];
      for (int lane = 0; lane < 8; lane++) {
        Floats sums[G][4] = {};
        for (int64_t i = lane; i < d; i += 8)
          for (int v = 0; v < 4; v++) {
            const Floats key = load(keys + i * kTile + c + 8 * v);
            for (int g = 0; g < G; g++) sums[g][v] = fused(key, all(q[g * d + i]), sums[g][v]);
          }
        std::copy_n(&sums[0][0], G * 4, &lanes[lane][0][0]);
      }
      for (int g = 0; g < G; g++)
        for (int v = 0; v < 4; v++) {
          const auto at = [&](int lane) { return lanes[lane][g][v]; };
          const Floats even = (at(0) + at(4)) + (at(2) + at(6)), odd = (at(1) + at(5)) + (at(3) + at(7));
          store(&weight[g][c + 8 * v], (even + odd) * scale);
        }
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
        for (int g = 0; g < G; g++) {
          const Floats by = all(weight[g][t]);
          left[g] = fused(load(value), by, left[g]), right[g] = fused(load(value + 8), by, right[g]);
        }
      for (int g = 0; g < G; g++) store(out + g * d + i, left[g]), store(out + g * d + i + 8, right[g]);
    }
  }

  void finish() {
    for (int g = 0; g < G; g++)
      for (int64_t i = 0; i < d; i++) out[g * d + i] /= total[g];
  }
};

}  // namespace
