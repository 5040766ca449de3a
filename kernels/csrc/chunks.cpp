// Checks of row numbers.
#include "chunks.h"

#include <algorithm>

namespace tessera {

namespace {

struct Extent {
  int64_t low, high;
};

TESSERA_SIMD Extent extent_of(const int64_t* numbers, int64_t n) {
  int64_t low = numbers[0], high = numbers[0];
  for (int64_t i = 0; i < n; ++i) {
    low = std::min(low, numbers[i]);
    high = std::max(high, numbers[i]);
  }
  return {low, high};
}

}  // namespace

void check_range(const char* name, const int64_t* numbers, int64_t n, int64_t lowest, int64_t end) {
  if (n == 0) return;
  const Extent extent = extent_of(numbers, n);
  TORCH_CHECK_INDEX(extent.low >= lowest && extent.high < end, name, ": expected ", lowest, " to ", end - 1, ", found ",
                    extent.low < lowest ? extent.low : extent.high);
}

}  // namespace tessera
