// Which rows are kept already, and places for those that are not.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace {

constexpr int64_t kAhead = 32;  // rows between the request for an entry and its use

at::Tensor take_places(const at::Tensor& places, const at::Tensor& rows_, int64_t taken) {
  const at::Tensor rows = rows_.contiguous();
  const int64_t n = rows.numel(), last = places.numel() - 1;
  TORCH_CHECK_VALUE(places.is_contiguous() && last >= 0, "places: expected contiguous int32 [1 or more]");
  TORCH_CHECK_VALUE(taken >= 0 && taken + n <= std::numeric_limits<int32_t>::max(), "taken: found ", taken);
  int32_t* const place = places.data_ptr<int32_t>();
  const int64_t* const in = rows.const_data_ptr<int64_t>();
  at::Tensor result = at::empty({n}, rows.options());
  int64_t* const out = result.mutable_data_ptr<int64_t>();
  const auto entry_of = [&](int64_t row) { return row < 0 ? last : std::min(row, last); };
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n) __builtin_prefetch(place + entry_of(in[i + kAhead]), 1);
    int32_t& mine = place[entry_of(in[i])];
    const bool open = mine == 0;
    out[found] = in[i];
    mine = open ? static_cast<int32_t>(taken + found + 1) : mine;
    found += open;
  }
  return result.narrow(0, 0, found);
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) { m.impl("take_places", &take_places); }
