// Sums over bags of rows that lie in one matrix, and the gradients of these sums.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "chunks.h"
#include "multiversion.h"

namespace {

using tessera::Fault;

constexpr int64_t kGrain = 1 << 13;  // values per thread below which another thread does not pay
constexpr int64_t kBlock = 32;       // bags of a key that are summed before those of the next key
constexpr int64_t kAhead = 16;       // bags

struct Bags {
  const int64_t* index;    // row of each position
  const int64_t* offsets;  // [keys * batch + 1] positions; bags of a key lie together
  const float* weights;    // of positions; null: 1
  int64_t keys;
  int64_t batch;
  int64_t rows;
  int64_t dim;

  TESSERA_INLINE bool wrong(int64_t i) const {
    return __builtin_expect(static_cast<uint64_t>(index[i]) >= static_cast<uint64_t>(rows), 0);
  }
  Fault fault(int64_t i) const { return {"index", index[i], rows}; }
  // Ask for the first row of a bag that is summed soon.
  TESSERA_INLINE void prefetch(const float* values, int64_t bag) const {
    if (bag >= keys * batch || offsets[bag] == offsets[bag + 1] || wrong(offsets[bag])) return;
    const float* const row = values + index[offsets[bag]] * dim;
    __builtin_prefetch(row);
    __builtin_prefetch(row + dim - 1);
  }
  TESSERA_INLINE float weight(int64_t i) const { return weights == nullptr ? 1.0f : weights[i]; }
};

// Columns [begin, begin + width) of a row, which have a tensor [batch, keys, width] of their own.
template <typename T>
struct Group {
  T* data;
  int64_t of_batch;  // distance of two rows of the batch in the tensor, and of two keys
  int64_t of_key;
  int64_t begin;
  int64_t width;

  TESSERA_INLINE T* at(int64_t b, int64_t key) const { return data + b * of_batch + key * of_key; }
};

template <typename T>
using Groups = std::vector<Group<T>>;

// The width of the first group, which has most of the columns, is known while compiling.
template <int64_t First, typename T>
TESSERA_INLINE int64_t width_of(const Groups<T>& groups, size_t g) {
  return First > 0 && g == 0 ? First : groups[g].width;
}

template <int64_t First>
TESSERA_INLINE Fault sum_bag(const Bags& given, const float* values, int64_t b, int64_t key,
                             const Groups<float>& sums) {
  const int64_t begin = given.offsets[key * given.batch + b], end = given.offsets[key * given.batch + b + 1];
  for (int64_t i = begin; i < end; ++i) {
    if (given.wrong(i)) return given.fault(i);
    const float weight = given.weight(i);
    for (size_t g = 0; g < sums.size(); ++g) {
      const int64_t width = width_of<First>(sums, g);
      const float* __restrict const row = values + given.index[i] * given.dim + sums[g].begin;
      float* __restrict const sum = sums[g].at(b, key);
      if (i == begin)
        for (int64_t c = 0; c < width; ++c) sum[c] = row[c] * weight;
      else
        for (int64_t c = 0; c < width; ++c) sum[c] += row[c] * weight;
    }
  }
  if (begin == end)
    for (size_t g = 0; g < sums.size(); ++g)
      std::memset(sums[g].at(b, key), 0, width_of<First>(sums, g) * sizeof(float));
  return {};
}

// Rows [begin, end) of the batch.
template <int64_t First>
TESSERA_INLINE Fault sum_bags(const Bags& given, const float* values, int64_t begin, int64_t end,
                              const Groups<float>& sums) {
  for (int64_t block = begin; block < end; block += kBlock)
    for (int64_t key = 0; key < given.keys; ++key)
      for (int64_t b = block; b < std::min(block + kBlock, end); ++b) {
        given.prefetch(values, key * given.batch + b + kAhead);
        const Fault fault = sum_bag<First>(given, values, b, key, sums);
        if (fault.name != nullptr) return fault;
      }
  return {};
}

// Gradients of the rows [begin, end), each summed in order of position. Every thread reads all positions and takes its
// own rows from them: no locks, and the same order of summation for any number of threads.
template <int64_t First>
TESSERA_INLINE Fault sum_gradients(const Bags& given, const Groups<const float>& grads, int64_t begin, int64_t end,
                                   float* out) {
  int64_t fresh = begin;  // rows from here on have not been written: the usual order is that of first occurrence
  for (int64_t key = 0; key < given.keys; ++key)
    for (int64_t b = 0; b < given.batch; ++b) {
      const int64_t bag = key * given.batch + b;
      if (b + kAhead < given.batch) __builtin_prefetch(grads[0].at(b + kAhead, key));
      for (int64_t i = given.offsets[bag]; i < given.offsets[bag + 1]; ++i) {
        if (given.wrong(i)) return given.fault(i);
        const int64_t row = given.index[i];
        if (row < begin || row >= end) continue;
        if (row > fresh) std::memset(out + fresh * given.dim, 0, (row - fresh) * given.dim * sizeof(float));
        const float weight = given.weight(i);
        for (size_t g = 0; g < grads.size(); ++g) {
          const int64_t width = width_of<First>(grads, g);
          const float* __restrict const grad = grads[g].at(b, key);
          float* __restrict const sum = out + row * given.dim + grads[g].begin;
          if (row < fresh)
            for (int64_t c = 0; c < width; ++c) sum[c] += grad[c] * weight;
          else
            for (int64_t c = 0; c < width; ++c) sum[c] = grad[c] * weight;
        }
        fresh = std::max(fresh, row + 1);
      }
    }
  std::memset(out + fresh * given.dim, 0, (end - fresh) * given.dim * sizeof(float));
  return {};
}

TESSERA_SIMD Fault sum_bags_of(const Bags& given, const float* values, int64_t begin, int64_t end,
                               const Groups<float>& sums) {
  switch (sums.empty() ? 0 : sums[0].width) {
    case 8: return sum_bags<8>(given, values, begin, end, sums);
    case 16: return sum_bags<16>(given, values, begin, end, sums);
    case 32: return sum_bags<32>(given, values, begin, end, sums);
    default: return sum_bags<0>(given, values, begin, end, sums);
  }
}

TESSERA_SIMD Fault sum_gradients_of(const Bags& given, const Groups<const float>& grads, int64_t begin, int64_t end,
                                    float* out) {
  switch (grads.empty() ? 0 : grads[0].width) {
    case 8: return sum_gradients<8>(given, grads, begin, end, out);
    case 16: return sum_gradients<16>(given, grads, begin, end, out);
    case 32: return sum_gradients<32>(given, grads, begin, end, out);
    default: return sum_gradients<0>(given, grads, begin, end, out);
  }
}

// What the tensors hold, which must live as long as the result.
Bags bags_of(const at::Tensor& index, const at::Tensor& offsets, const at::Tensor& weights, int64_t keys, int64_t rows,
             int64_t dim) {
  const int64_t bags = offsets.numel() - 1;
  const int64_t* const at = offsets.const_data_ptr<int64_t>();
  bool good = at[0] >= 0 && at[bags] <= index.numel();
  for (int64_t b = 0; b < bags; ++b) good &= at[b] <= at[b + 1];
  TORCH_CHECK_INDEX(good, "offsets must not decrease and must stay inside the ", index.numel(), " positions");
  TORCH_CHECK_VALUE(keys > 0 && bags % keys == 0, "offsets: expected as many bags of each of ", keys, " keys");
  const float* const factors = weights.defined() ? weights.const_data_ptr<float>() : nullptr;
  return {index.const_data_ptr<int64_t>(), at, factors, keys, bags / keys, rows, dim};
}

at::Tensor contiguous(const std::optional<at::Tensor>& given) {
  return given.has_value() ? given->contiguous() : at::Tensor();
}

int64_t grain_of(int64_t values) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, values)); }

std::vector<at::Tensor> pool(const at::Tensor& values_, const at::Tensor& index_, const at::Tensor& offsets_,
                             const std::optional<at::Tensor>& weights_, int64_t keys, at::IntArrayRef widths) {
  const at::Tensor values = values_.contiguous(), index = index_.contiguous(), offsets = offsets_.contiguous();
  const at::Tensor weights = contiguous(weights_);
  const Bags given = bags_of(index, offsets, weights, keys, values.size(0), values.size(1));
  std::vector<at::Tensor> results;
  Groups<float> groups;
  int64_t column = 0;
  for (const int64_t width : widths) {
    results.push_back(at::empty({given.batch, keys, width}, values.options()));
    groups.push_back({results.back().mutable_data_ptr<float>(), keys * width, width, column, width});
    column += width;
  }
  TORCH_CHECK_VALUE(column == given.dim, "widths: expected ", given.dim, " columns together, found ", column);
  const float* const in = values.const_data_ptr<float>();
  at::parallel_for(0, given.batch, grain_of(keys * given.dim),
                   [&](int64_t begin, int64_t end) { sum_bags_of(given, in, begin, end, groups).raise(); });
  return results;
}

at::Tensor pool_backward(at::TensorList grads_, const at::Tensor& index_, const at::Tensor& offsets_,
                         const std::optional<at::Tensor>& weights_, int64_t rows) {
  TORCH_CHECK_VALUE(!grads_.empty(), "grads: expected one or more");
  const at::Tensor index = index_.contiguous(), offsets = offsets_.contiguous(), weights = contiguous(weights_);
  std::vector<at::Tensor> held;  // copies of what has gaps between the columns of a row
  Groups<const float> groups;
  int64_t column = 0;
  for (const at::Tensor& grad : grads_) {
    TORCH_CHECK_VALUE(grad.dim() == 3, "grads: expected [batch, keys, width]");
    const int64_t width = grad.size(2);
    held.push_back(width == 1 || grad.stride(2) == 1 ? grad : grad.contiguous());
    const at::Tensor& one = held.back();
    groups.push_back({one.const_data_ptr<float>(), one.stride(0), one.stride(1), column, width});
    column += width;
  }
  const Bags given = bags_of(index, offsets, weights, grads_[0].size(1), rows, column);
  for (const at::Tensor& grad : grads_)
    TORCH_CHECK_VALUE(grad.size(0) == given.batch && grad.size(1) == given.keys, "grads: expected one row per bag");
  at::Tensor result = at::empty({rows, given.dim}, index.options().dtype(at::kFloat));
  float* const out = result.mutable_data_ptr<float>();
  at::parallel_for(0, rows, grain_of(given.dim),
                   [&](int64_t begin, int64_t end) { sum_gradients_of(given, groups, begin, end, out).raise(); });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("pool", &pool);
  m.impl("pool_backward", &pool_backward);
}
