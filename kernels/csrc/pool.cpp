// Sums over bags of rows that lie in one matrix, and the gradients of these sums.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>

#include "chunks.h"
#include "multiversion.h"

namespace {

using tessera::Fault;

constexpr int64_t kGrain = 1 << 13;  // values per thread below which another thread does not pay

struct Bags {
  const int64_t* index;    // row of each position
  const int64_t* offsets;  // [bags + 1] positions
  const float* weights;    // of positions; null: 1
  int64_t bags;
  int64_t rows;
  int64_t dim;

  TESSERA_INLINE bool wrong(int64_t i) const {
    return __builtin_expect(static_cast<uint64_t>(index[i]) >= static_cast<uint64_t>(rows), 0);
  }
  Fault fault(int64_t i) const { return {"index", index[i], rows}; }
};

template <int64_t Dim>
TESSERA_INLINE Fault sum_bags(const Bags& given, const float* values, int64_t begin, int64_t end, float* out) {
  const int64_t dim = Dim > 0 ? Dim : given.dim;
  for (int64_t b = begin; b < end; ++b) {
    float* __restrict const sum = out + b * dim;
    bool empty = true;
    for (int64_t i = given.offsets[b]; i < given.offsets[b + 1]; ++i) {
      if (given.wrong(i)) return given.fault(i);
      const float* __restrict const row = values + given.index[i] * dim;
      const float weight = given.weights == nullptr ? 1.0f : given.weights[i];
      if (empty)
        for (int64_t c = 0; c < dim; ++c) sum[c] = row[c] * weight;
      else
        for (int64_t c = 0; c < dim; ++c) sum[c] += row[c] * weight;
      empty = false;
    }
    if (empty) std::memset(sum, 0, dim * sizeof(float));
  }
  return {};
}

// Gradients of the rows [begin, end), each summed in order of position. Every thread reads all positions and takes its
// own rows from them: no locks, and the same order of summation for any number of threads.
template <int64_t Dim>
TESSERA_INLINE Fault sum_gradients(const Bags& given, const float* grads, int64_t begin, int64_t end, float* out) {
  const int64_t dim = Dim > 0 ? Dim : given.dim;
  int64_t fresh = begin;  // rows from here on have not been written: the usual order is that of first occurrence
  for (int64_t b = 0; b < given.bags; ++b) {
    const float* __restrict const grad = grads + b * dim;
    for (int64_t i = given.offsets[b]; i < given.offsets[b + 1]; ++i) {
      if (given.wrong(i)) return given.fault(i);
      const int64_t row = given.index[i];
      if (row < begin || row >= end) continue;
      float* __restrict const sum = out + row * dim;
      const float weight = given.weights == nullptr ? 1.0f : given.weights[i];
      if (row < fresh) {
        for (int64_t c = 0; c < dim; ++c) sum[c] += grad[c] * weight;
        continue;
      }
      if (row > fresh) std::memset(out + fresh * dim, 0, (row - fresh) * dim * sizeof(float));
      for (int64_t c = 0; c < dim; ++c) sum[c] = grad[c] * weight;
      fresh = row + 1;
    }
  }
  std::memset(out + fresh * dim, 0, (end - fresh) * dim * sizeof(float));
  return {};
}

// The usual widths, with and without the first-order weight beside a vector, are known while compiling.
TESSERA_SIMD Fault sum_bags_of(const Bags& given, const float* values, int64_t begin, int64_t end, float* out) {
  switch (given.dim) {
    case 8: return sum_bags<8>(given, values, begin, end, out);
    case 16: return sum_bags<16>(given, values, begin, end, out);
    case 17: return sum_bags<17>(given, values, begin, end, out);
    case 32: return sum_bags<32>(given, values, begin, end, out);
    default: return sum_bags<0>(given, values, begin, end, out);
  }
}

TESSERA_SIMD Fault sum_gradients_of(const Bags& given, const float* grads, int64_t begin, int64_t end, float* out) {
  switch (given.dim) {
    case 8: return sum_gradients<8>(given, grads, begin, end, out);
    case 16: return sum_gradients<16>(given, grads, begin, end, out);
    case 17: return sum_gradients<17>(given, grads, begin, end, out);
    case 32: return sum_gradients<32>(given, grads, begin, end, out);
    default: return sum_gradients<0>(given, grads, begin, end, out);
  }
}

// What the tensors hold, which must live as long as the result.
Bags bags_of(const at::Tensor& index, const at::Tensor& offsets, const at::Tensor& weights, int64_t rows, int64_t dim) {
  const int64_t bags = offsets.numel() - 1;
  const int64_t* const at = offsets.const_data_ptr<int64_t>();
  bool good = at[0] >= 0 && at[bags] <= index.numel();
  for (int64_t b = 0; b < bags; ++b) good &= at[b] <= at[b + 1];
  TORCH_CHECK_INDEX(good, "offsets must not decrease and must stay inside the ", index.numel(), " positions");
  const float* const factors = weights.defined() ? weights.const_data_ptr<float>() : nullptr;
  return {index.const_data_ptr<int64_t>(), at, factors, bags, rows, dim};
}

at::Tensor contiguous(const std::optional<at::Tensor>& given) {
  return given.has_value() ? given->contiguous() : at::Tensor();
}

int64_t grain_of(int64_t dim) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, dim)); }

at::Tensor pool(const at::Tensor& values_, const at::Tensor& index_, const at::Tensor& offsets_,
                const std::optional<at::Tensor>& weights_) {
  const at::Tensor values = values_.contiguous(), index = index_.contiguous(), offsets = offsets_.contiguous();
  const at::Tensor weights = contiguous(weights_);
  const Bags given = bags_of(index, offsets, weights, values.size(0), values.size(1));
  at::Tensor result = at::empty({given.bags, given.dim}, values.options());
  const float* const in = values.const_data_ptr<float>();
  float* const out = result.mutable_data_ptr<float>();
  at::parallel_for(0, given.bags, grain_of(given.dim),
                   [&](int64_t begin, int64_t end) { sum_bags_of(given, in, begin, end, out).raise(); });
  return result;
}

at::Tensor pool_backward(const at::Tensor& grads_, const at::Tensor& index_, const at::Tensor& offsets_,
                         const std::optional<at::Tensor>& weights_, int64_t rows) {
  const at::Tensor grads = grads_.contiguous(), index = index_.contiguous(), offsets = offsets_.contiguous();
  const at::Tensor weights = contiguous(weights_);
  const Bags given = bags_of(index, offsets, weights, rows, grads.size(1));
  TORCH_CHECK_VALUE(grads.size(0) == given.bags, "grads: expected one row per bag");
  at::Tensor result = at::empty({rows, given.dim}, grads.options());
  const float* const in = grads.const_data_ptr<float>();
  float* const out = result.mutable_data_ptr<float>();
  at::parallel_for(0, rows, grain_of(given.dim),
                   [&](int64_t begin, int64_t end) { sum_gradients_of(given, in, begin, end, out).raise(); });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("pool", &pool);
  m.impl("pool_backward", &pool_backward);
}
