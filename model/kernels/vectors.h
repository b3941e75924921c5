// Eight floats at a time, for the other files here. Knows nothing of what is computed with them.
//
// x86-64 with AVX2 and FMA.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

typedef float Floats __attribute__((vector_size(32), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(32), aligned(4)));

inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline Floats load(const uint16_t* p) {  // bfloat16 is the upper half of a float
  const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Floats>(_mm256_slli_epi32(low, 16));
}
inline void store(float* p, Floats v) { *reinterpret_cast<Floats*>(p) = v; }
inline void store(uint16_t* p, Floats v) {  // to the nearest bfloat16, halves to even; NaN stays NaN
  const __m256i bits = reinterpret_cast<__m256i>(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i unsound = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i whole = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), unsound), 16);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
}

inline Floats all(float x) { return _mm256_set1_ps(x); }

// a * b + c, rounded once. Nothing else is fused (-ffp-contract=off): which sums are does not depend on the place.
inline Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

// e^x for x <= 0, to 2e-7: 2^n by its bits, and e^r by its Taylor series for |r| <= ln 2 / 2. NaN stays NaN.
inline Floats exponential(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const Floats n = _mm256_round_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // ln 2 in two parts, the first exact when multiplied
  const Floats r = fused(n, all(2.12194440e-4f), fused(n, all(-0.693359375f), x));
  Floats series = fused(r, all(1.0f / 720), all(1.0f / 120));
  for (const float term : {1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = fused(series, r, all(term));
  return series * reinterpret_cast<Floats>((reinterpret_cast<Ints>(_mm256_cvtps_epi32(n)) + 127) << 23);
}

inline float sum(Floats v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

inline float largest(Floats v) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}

}  // namespace
