// One token for each row of logits: slots::choose. What is chosen, and why, is defined in sampler.py.
//
// A row's token depends on that row alone. Draws differ from sampler.py's in the last bit of a logarithm at most.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"
#include "vectors.h"

using torch::stable::Tensor;

namespace {

constexpr int64_t kCandidates = 256;  // as CANDIDATES in sampler.py
constexpr int64_t kSpan = 32;         // logits that share a maximum: a candidate is looked for where one is large
constexpr float kLoudest = 16.7f;     // no noise is: -log(-log(1 - 2^-24)) = 16.6
constexpr int64_t kUnsound = -1;      // instead of a token, where not all logits are finite

struct Candidate {
  float value;
  int64_t token;
};

// What a request asks for, and where its row stands.
struct Rules {
  int64_t position;
  float temperature, top_p;
  int64_t top_k;
  float penalty;
  int64_t key;

  float scaled(float logit) const { return logit / std::max(temperature, 1e-4f); }
  bool uncut() const { return top_k == 0 && top_p >= 1; }
};

// 32-bit integer hash, see _mix in sampler.py; of a number, or of eight.
template <typename T>
T mix(T x) {
  x = (x ^ x >> 16) * 0x21F0AAAD;
  x = (x ^ x >> 15) * 0x735A2D97;
  return x ^ x >> 15;
}

// Standard Gumbel noise, a function of a row's key and position (its `seed`) and the token.
class Noise {
 public:
  explicit Noise(const Rules& rules) : seed(mix(static_cast<uint32_t>(rules.key ^ rules.position))) {}

  float of(int64_t token) const {
    const float uniform = (static_cast<float>(mix(seed ^ static_cast<uint32_t>(token)) >> 9) + 0.5f) * 0x1p-23f;
    return -std::log(-std::log(uniform));
  }

  // Which of eight tokens from `first` on may have noise above `least`, a bit each: their hashes tell, without logarithms.
  int above(int64_t first, float least) const {
    const float bound = std::exp(-std::exp(-least)) * 0x1p23f - 4;  // 4: more than what rounding may take
    const Words tokens = Words{0, 1, 2, 3, 4, 5, 6, 7} + static_cast<uint32_t>(first);
    const Floats hashed = _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(mix(seed ^ tokens) >> 9));
    return _mm256_movemask_ps(_mm256_cmp_ps(hashed, _mm256_set1_ps(bound), _CMP_GE_OQ));
  }

 private:
  typedef uint32_t Words __attribute__((vector_size(32)));
  uint32_t seed;
};

// One row's logits, with the largest of each span. Its memory is kept from row to row.
class Row {
 public:
  // Takes in the logits, penalised; false where one is not finite.
  bool read(const float* logits, const uint8_t* seen, int64_t count, float penalty) {
    size = count, spans.resize((count + kSpan - 1) / kSpan);
    values = logits;
    if (penalty != 1) {
      penalised.resize(count);
      for (int64_t i = 0; i < count; i++) {
        const float v = logits[i];
        penalised[i] = !seen[i] ? v : v > 0 ? v / penalty : v * penalty;
      }
      values = penalised.data();
    }
    Floats unsound = {};  // NaN where a logit is NaN or infinite
    float rest = 0;
    for (int64_t i = 0; i < count; i += kSpan) {
      Floats tops = Floats{} - INFINITY;
      float top = -INFINITY;
      if (i + kSpan <= count) {
        for (int64_t j = i; j < i + kSpan; j += 8) {
          const Floats v = load(values + j);
          tops = _mm256_max_ps(v, tops);
          unsound += v * 0.0f;
        }
        top = largest(tops);
      } else {
        for (int64_t j = i; j < count; j++) top = std::max(top, values[j]), rest += values[j] * 0.0f;
      }
      spans[i / kSpan] = top;
    }
    return sum(unsound) + rest == 0;
  }

  int64_t best() const {
    const int64_t span = std::max_element(spans.begin(), spans.end()) - spans.begin();
    const float* from = values + span * kSpan;
    return std::find(from, values + size, spans[span]) - values;
  }

  // The largest kCandidates, descending. They lie in the spans whose maxima are the largest, none below the last of
  // these maxima.
  const std::vector<Candidate>& largest_ones() {
    const int64_t wanted = std::min<int64_t>(kCandidates, size);
    float least = -INFINITY;
    if (static_cast<int64_t>(spans.size()) > kCandidates) {
      order = spans;
      std::nth_element(order.begin(), order.begin() + kCandidates - 1, order.end(), std::greater<>());
      least = order[kCandidates - 1];
    }
    found.clear();
    for (size_t span = 0; span < spans.size(); span++) {
      if (spans[span] < least) continue;
      const int64_t end = std::min<int64_t>((span + 1) * kSpan, size);
      for (int64_t i = span * kSpan; i < end; i++)
        if (values[i] >= least) found.push_back({values[i], i});
    }
    const auto before = [](const Candidate& a, const Candidate& b) {
      return a.value > b.value || (a.value == b.value && a.token < b.token);
    };
    std::partial_sort(found.begin(), found.begin() + wanted, found.end(), before);
    found.resize(wanted);
    return found;
  }

  // Drawn with Gumbel-max from the whole vocabulary; noise is computed where it can still win.
  int64_t draw(const Rules& rules) const {
    const Noise noise(rules);
    int64_t token = this->best();
    float best = rules.scaled(values[token]) + noise.of(token);
    for (int64_t i = 0; i < size; i += 8) {
      const float least = best - rules.scaled(spans[i / kSpan]);
      if (least > kLoudest) continue;
      for (int left = noise.above(i, least); left; left &= left - 1) {
        const int64_t other = i + __builtin_ctz(left);
        if (other >= size) break;
        const float score = rules.scaled(values[other]) + noise.of(other);
        if (score > best) best = score, token = other;
      }
    }
    return token;
  }

 private:
  int64_t size = 0;
  const float* values = nullptr;
  std::vector<float> penalised, spans, order;
  std::vector<Candidate> found;
};

// Softmax of the candidates at this temperature, cut to top_k, then to top_p, drawn with Gumbel-max.
int64_t draw(const std::vector<Candidate>& candidates, const Rules& rules) {
  const size_t count = rules.top_k ? std::min<size_t>(rules.top_k, candidates.size()) : candidates.size();
  float weights[kCandidates], total = 0;
  for (size_t i = 0; i < count; i++) {
    weights[i] = std::exp(rules.scaled(candidates[i].value) - rules.scaled(candidates[0].value));
    total += weights[i];
  }
  const Noise noise(rules);
  float before = 0, best = -INFINITY;
  int64_t token = candidates[0].token;
  for (size_t i = 0; i < count && (i == 0 || before < rules.top_p); i++) {
    const float score = rules.scaled(candidates[i].value) + noise.of(candidates[i].token);
    if (score > best) best = score, token = candidates[i].token;
    before += weights[i] / total;
  }
  return token;
}

// logits float32 [count, n]; position, row int64 [count]; temperature, top_p, penalty float32 [rows]; top_k, key int64
// [rows]; seen bool [rows, n] -> int64 [count], kUnsound where logits are not all finite. What is chosen counts as seen.
Tensor choose(const Tensor& logits, const Tensor& position, const Tensor& row, const Tensor& temperature,
              const Tensor& top_p, const Tensor& top_k, const Tensor& penalty, const Tensor& key, Tensor seen) {
  const int64_t count = logits.size(0), n = logits.size(1);
  Tensor result = torch::stable::empty_like(position);
  const auto* all = static_cast<const float*>(logits.data_ptr());
  auto* marks = static_cast<uint8_t*>(seen.data_ptr());
  const auto floats = [](const Tensor& t) { return static_cast<const float*>(t.data_ptr()); };
  const auto whole = [](const Tensor& t) { return static_cast<const int64_t*>(t.data_ptr()); };
  auto* out = static_cast<int64_t*>(result.data_ptr());
  each(count, 1, [&](int64_t i) {
    thread_local Row own;
    const int64_t r = whole(row)[i];
    const Rules rules{whole(position)[i], floats(temperature)[r], floats(top_p)[r],
                      whole(top_k)[r],    floats(penalty)[r],     whole(key)[r]};
    const bool sound = own.read(all + i * n, marks + r * n, n, rules.penalty);
    out[i] = !sound                   ? kUnsound
             : rules.temperature == 0 ? own.best()
             : rules.uncut()          ? own.draw(rules)
                                      : draw(own.largest_ones(), rules);
  });
  for (int64_t i = 0; i < count; i++)
    if (out[i] != kUnsound) marks[whole(row)[i] * n + out[i]] = 1;
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slots, m) {
  m.def(
      "choose(Tensor logits, Tensor position, Tensor row, Tensor temperature, Tensor top_p, Tensor top_k, Tensor "
      "penalty, Tensor key, Tensor(a!) seen) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(slots, CPU, m) { m.impl("choose", TORCH_BOX(&choose)); }
