// Distinct ids in order of first occurrence, by a hash table of positions in the list of distinct ids.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "mix.h"
#include "multiversion.h"

namespace {

constexpr int64_t kBlock = 64;  // ids whose slots are requested together

TESSERA_SIMD void hash_block(const int64_t* ids, int64_t n, uint64_t mask, uint64_t* slots) {
  for (int64_t i = 0; i < n; ++i) slots[i] = tessera::mix64(static_cast<uint64_t>(ids[i])) & mask;
}

struct Distinct {
  int64_t* ids;
  int64_t* counts;
  int64_t* inverse;
};

// The table holds the place of an id among the distinct ones, counted from 1; 0 is an empty slot.
template <typename Place>
int64_t merge(const int64_t* ids, int64_t n, const Distinct& out) {
  uint64_t size = 16;
  while (size < 2 * static_cast<uint64_t>(n)) size *= 2;
  std::vector<Place> table(size);
  Place last = 0;
  uint64_t slots[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t block = std::min(kBlock, n - begin);
    hash_block(ids + begin, block, size - 1, slots);
    for (int64_t i = 0; i < block; ++i) __builtin_prefetch(&table[slots[i]], 1);
    for (int64_t i = 0; i < block; ++i) {
      const int64_t id = ids[begin + i];
      uint64_t slot = slots[i];
      Place place;
      while ((place = table[slot]) != 0 && out.ids[place - 1] != id) slot = (slot + 1) & (size - 1);
      if (place == 0) {
        table[slot] = place = ++last;
        out.ids[place - 1] = id;
        out.counts[place - 1] = 0;
      }
      ++out.counts[place - 1];
      out.inverse[begin + i] = static_cast<int64_t>(place) - 1;
    }
  }
  return static_cast<int64_t>(last);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> unique_inverse(const at::Tensor& ids_) {
  TORCH_CHECK_VALUE(ids_.dim() == 1, "expected ids int64 [n]");
  const at::Tensor ids = ids_.contiguous();
  const int64_t n = ids.numel();
  at::Tensor unique = at::empty({n}, ids.options());
  at::Tensor counts = at::empty({n}, ids.options());
  at::Tensor inverse = at::empty({n}, ids.options());
  const Distinct out{unique.mutable_data_ptr<int64_t>(), counts.mutable_data_ptr<int64_t>(),
                     inverse.mutable_data_ptr<int64_t>()};
  const int64_t* in = ids.const_data_ptr<int64_t>();
  const int64_t distinct =
      n < std::numeric_limits<uint32_t>::max() ? merge<uint32_t>(in, n, out) : merge<uint64_t>(in, n, out);
  return {unique.resize_({distinct}), inverse, counts.resize_({distinct})};
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) { m.impl("unique_inverse", &unique_inverse); }
