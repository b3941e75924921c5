// Which threads go over the rows of an input. Knows nothing of what is done with a row.

#pragma once

#include <cstdint>

namespace {

constexpr int64_t kFew = 4;  // rows that one thread goes over: waking another costs more

// Calls `row(r)` for each row: together where they are many, else on this thread.
template <typename Row>
void each_row(int64_t count, const Row& row) {
#pragma omp parallel for schedule(static) if (count > kFew)
  for (int64_t r = 0; r < count; r++) row(r);
}

}  // namespace
