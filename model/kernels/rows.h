// Which threads go over the rows of an input.

#pragma once

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

}  // namespace
