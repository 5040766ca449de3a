// The latest time of each place, over bags of places of which each has a time.
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "chunks.h"

namespace {

at::Tensor latest_of_bags(const at::Tensor& times_, const at::Tensor& offsets_, const at::Tensor& places_,
                          int64_t count, int64_t none) {
  const at::Tensor times = times_.contiguous(), offsets = offsets_.contiguous(), places = places_.contiguous();
  const int64_t batch = times.numel(), bags = offsets.numel() - 1, n = places.numel();
  at::Tensor result = at::full({count}, none, times.options());
  const int64_t* const time = times.const_data_ptr<int64_t>();
  const int64_t* const offset = offsets.const_data_ptr<int64_t>();
  const int64_t* const place = places.const_data_ptr<int64_t>();
  int64_t* const out = result.mutable_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(bags == 0 || (batch > 0 && bags % batch == 0), "offsets: expected as many bags of each key");
  TORCH_CHECK_INDEX(bags >= 0 && offset[0] == 0 && offset[bags] == n, "offsets: expected from 0 to ", n);
  for (int64_t first = 0; first < bags; first += batch)
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t begin = offset[first + b], end = offset[first + b + 1];
      TORCH_CHECK_INDEX(begin <= end && end <= n, "offsets: expected ascending up to ", n, ", found ", end);
      for (int64_t i = begin; i < end; ++i) {
        if (place[i] < 0 || place[i] >= count) tessera::Fault{"places", place[i], count}.raise();
        out[place[i]] = std::max(out[place[i]], time[b]);
      }
    }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) { m.impl("latest_of_bags", &latest_of_bags); }
