// Distinct ids in order of first occurrence, by a hash table of positions in the list of distinct ids; for many tables
// at once by one such table after the other, each small enough for the cache.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <tuple>
#include <vector>

#include "mix.h"
#include "multiversion.h"

namespace {

constexpr int64_t kBlock = 64;       // ids whose slots are requested together
constexpr int64_t kGrain = 1 << 14;  // ids per thread below which another thread does not pay

TESSERA_SIMD void hash_block(const int64_t* ids, int64_t n, uint64_t mask, uint64_t* slots) {
  for (int64_t i = 0; i < n; ++i) slots[i] = tessera::mix64(static_cast<uint64_t>(ids[i])) & mask;
}

struct Distinct {
  int64_t* ids;
  int64_t* counts;
  int64_t* inverse;
};

// The table holds the place of an id among the distinct ones, counted from 1; 0 is an empty slot. Places in the inverse
// are counted from `before`.
template <typename Place>
int64_t merge(const int64_t* ids, int64_t n, const Distinct& out, int64_t before, std::vector<Place>& table) {
  uint64_t size = 16;
  while (size < 2 * static_cast<uint64_t>(n)) size *= 2;
  table.assign(size, 0);
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
      out.inverse[begin + i] = before + static_cast<int64_t>(place) - 1;
    }
  }
  return static_cast<int64_t>(last);
}

// Memory for n ids; only the beginning of `ids` and `counts` is kept.
struct Result {
  at::Tensor ids, counts, inverse;

  explicit Result(const at::Tensor& like)
      : ids(at::empty_like(like)), counts(at::empty_like(like)), inverse(at::empty_like(like)) {}

  Distinct from(int64_t place, int64_t position) {
    return {ids.mutable_data_ptr<int64_t>() + place, counts.mutable_data_ptr<int64_t>() + place,
            inverse.mutable_data_ptr<int64_t>() + position};
  }
};

bool fits(int64_t n) { return n < std::numeric_limits<uint32_t>::max(); }

std::tuple<at::Tensor, at::Tensor, at::Tensor> unique_inverse(const at::Tensor& ids_) {
  TORCH_CHECK_VALUE(ids_.dim() == 1, "expected ids int64 [n]");
  const at::Tensor ids = ids_.contiguous();
  const int64_t n = ids.numel();
  Result found(ids);
  const int64_t* in = ids.const_data_ptr<int64_t>();
  std::vector<uint32_t> small;
  std::vector<uint64_t> large;
  const int64_t distinct = fits(n) ? merge(in, n, found.from(0, 0), 0, small) : merge(in, n, found.from(0, 0), 0, large);
  return {found.ids.resize_({distinct}), found.inverse, found.counts.resize_({distinct})};
}

// Merge the tables [first, last), each of them for itself; the distinct ones of all of them follow one another from
// bounds[first] on, and the inverse counts them from 0.
void merge_tables(const int64_t* ids, const int64_t* bounds, int64_t first, int64_t last, Result& found,
                  int64_t* distinct) {
  std::vector<uint32_t> table;
  int64_t before = 0;
  for (int64_t t = first; t < last; ++t) {
    const int64_t begin = bounds[t], n = bounds[t + 1] - begin;
    distinct[t] = merge(ids + begin, n, found.from(bounds[first] + before, begin), before, table);
    before += distinct[t];
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> unique_tables(const at::Tensor& ids_,
                                                                         const at::Tensor& bounds_) {
  const at::Tensor ids = ids_.contiguous(), bounds = bounds_.contiguous();
  const int64_t n = ids.numel(), tables = bounds.numel() - 1;
  const int64_t* const in = ids.const_data_ptr<int64_t>();
  const int64_t* const b = bounds.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(tables >= 1 && b[0] == 0 && b[tables] == n && fits(n), "bounds: expected int64 from 0 to ", n);
  for (int64_t t = 0; t < tables; ++t)
    TORCH_CHECK_VALUE(b[t] <= b[t + 1], "bounds: expected ascending, found ", b[t], " before ", b[t + 1]);
  Result found(ids);
  std::vector<int64_t> distinct(tables), begins;
  // A thread has the tables that begin among its ids.
  std::mutex change;
  at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    const int64_t first = std::lower_bound(b, b + tables, begin) - b, last = std::lower_bound(b, b + tables, end) - b;
    if (first == last) return;
    merge_tables(in, b, first, last, found, distinct.data());
    const std::lock_guard<std::mutex> lock(change);
    begins.push_back(first);
  });
  at::Tensor ends = at::zeros({tables + 1}, bounds.options());
  int64_t* const end = ends.mutable_data_ptr<int64_t>();
  for (int64_t t = 0; t < tables; ++t) end[t + 1] = end[t] + distinct[t];
  std::sort(begins.begin(), begins.end());
  begins.push_back(tables);
  for (size_t part = 1; part + 1 < begins.size(); ++part) {  // the first one is in its place
    const int64_t first = begins[part], last = begins[part + 1], to = end[first], count = end[last] - to;
    const Distinct from = found.from(b[first], b[first]), here = found.from(to, 0);
    std::memmove(here.ids, from.ids, count * sizeof(int64_t));
    std::memmove(here.counts, from.counts, count * sizeof(int64_t));
    for (int64_t i = 0; i < b[last] - b[first]; ++i) from.inverse[i] += to;
  }
  return {found.ids.resize_({end[tables]}), found.inverse, found.counts.resize_({end[tables]}), ends};
}

// Positions by place, each place's ascending: counting sort.
std::tuple<at::Tensor, at::Tensor> positions_of(const at::Tensor& inverse_, const at::Tensor& counts_) {
  const at::Tensor inverse = inverse_.contiguous(), counts = counts_.contiguous();
  const int64_t n = inverse.numel(), places = counts.numel();
  at::Tensor order = at::empty({n}, inverse.options()), begins = at::empty({places + 1}, inverse.options());
  const int64_t* const in = inverse.const_data_ptr<int64_t>();
  const int64_t* const count = counts.const_data_ptr<int64_t>();
  int64_t* const out = order.mutable_data_ptr<int64_t>();
  int64_t* const begin = begins.mutable_data_ptr<int64_t>();
  int64_t total = 0;
  for (int64_t p = 0; p < places; ++p) {
    begin[p] = total;
    total += count[p];
  }
  begin[places] = total;
  TORCH_CHECK_VALUE(total == n, "counts: expected ", n, " in all, found ", total);
  std::vector<int64_t> next(begin, begin + places);
  for (int64_t i = 0; i < n; ++i) {
    TORCH_CHECK_INDEX(in[i] >= 0 && in[i] < places && next[in[i]] < begin[in[i] + 1], "inverse: expected below ", places,
                      ", each as often as counted, found ", in[i]);
    out[next[in[i]]++] = i;
  }
  return {order, begins};
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) { 
  m.impl("unique_inverse", &unique_inverse);
  m.impl("unique_tables", &unique_tables);
  m.impl("positions_of", &positions_of);
}
