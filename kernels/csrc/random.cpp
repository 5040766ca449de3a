// Tensors of random numbers: rows are independent, threads share them out.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "multiversion.h"
#include "random.h"

namespace {

constexpr int64_t kGrain = 1 << 13;  // numbers per thread below which another thread does not pay

TESSERA_SIMD void uniform_rows(uint64_t stream, const int64_t* ids, int64_t rows, int64_t dim, float* out) {
  for (int64_t i = 0; i < rows; ++i) tessera::uniform_row(tessera::random_row(stream, ids[i]), dim, out + i * dim);
}

void normal_rows(uint64_t stream, const int64_t* ids, int64_t rows, int64_t dim, float* out) {
  for (int64_t i = 0; i < rows; ++i) tessera::normal_row(tessera::random_row(stream, ids[i]), dim, out + i * dim);
}

template <typename Rows>
at::Tensor fill(int64_t stream, const at::Tensor& ids_, int64_t dim, Rows rows) {
  TORCH_CHECK_VALUE(ids_.dim() == 1 && dim >= 1, "expected ids int64 [n] and dim of at least 1");
  const at::Tensor ids = ids_.contiguous();
  at::Tensor result = at::empty({ids.numel(), dim}, ids.options().dtype(at::kFloat));
  const int64_t* in = ids.const_data_ptr<int64_t>();
  float* out = result.mutable_data_ptr<float>();
  at::parallel_for(0, ids.numel(), std::max<int64_t>(1, kGrain / dim), [&](int64_t begin, int64_t end) {
    rows(static_cast<uint64_t>(stream), in + begin, end - begin, dim, out + begin * dim);
  });
  return result;
}

at::Tensor uniform(int64_t stream, const at::Tensor& ids, int64_t dim) {
  return fill(stream, ids, dim, uniform_rows);
}

at::Tensor normal(int64_t stream, const at::Tensor& ids, int64_t dim) { return fill(stream, ids, dim, normal_rows); }

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("uniform", &uniform);
  m.impl("normal", &normal);
}
