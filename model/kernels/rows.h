// What the kernels' files have in common: which threads go over the rows of an input, where results go, and attention.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include "pool.h"

namespace {

constexpr int64_t kFew = 4;  // rows that one thread goes over: waking another costs more

// Calls `one(i)` for each i in [0, count), at least `grain` of them on one thread.
template <typename One>
void each(int64_t count, int64_t grain, const One& one) {
  Pool::shared().run(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) one(i);
  });
}

// A new tensor [rows, columns] of the kind that `like` is; 3 us less than torch::stable::new_empty, which goes through the
// dispatcher, and a step makes 120.
inline torch::stable::Tensor empty(const torch::stable::Tensor& like, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  int32_t dtype;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
  return torch::stable::Tensor(made);
}

}  // namespace

// slots::attend, of attention.cpp.
torch::stable::Tensor attend(const torch::stable::Tensor& qkv, const torch::stable::Tensor& cos,
                             const torch::stable::Tensor& sin, torch::stable::Tensor keys, torch::stable::Tensor values,
                             const torch::stable::Tensor& tables, const torch::stable::Tensor& tokens, double scale);
