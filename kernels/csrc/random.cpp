// The counter-based generator as kernels/random.py defines it: rows are independent, threads share them out.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "mix.h"
#include "multiversion.h"

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ULL;
constexpr double kTwoPi = 6.283185307179586476925286766559;
constexpr int64_t kGrain = 1 << 13;  // numbers per thread below which another thread does not pay

inline uint64_t row_key(uint64_t stream, int64_t id) {
  return tessera::mix64(tessera::mix64(static_cast<uint64_t>(id) + kGolden) ^ stream);
}

TESSERA_SIMD void uniform_rows(uint64_t stream, const int64_t* ids, int64_t rows, int64_t dim, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const uint64_t key = row_key(stream, ids[i]);
    float* const row = out + i * dim;
    for (int64_t c = 0; c < dim; ++c) {
      const uint64_t bits = tessera::mix64(key + static_cast<uint64_t>(c + 1) * kGolden);
      row[c] = static_cast<float>(static_cast<int32_t>(bits >> 40)) * 0x1p-24f;
    }
  }
}

// The multiplications that vectorise are few here beside the logarithm and the sine, so one version is enough.
void normal_rows(uint64_t stream, const int64_t* ids, int64_t rows, int64_t dim, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const uint64_t key = row_key(stream, ids[i]);
    float* const row = out + i * dim;
    for (int64_t c = 0; c < dim; c += 2) {
      const uint64_t first = tessera::mix64(key + static_cast<uint64_t>(c + 1) * kGolden);
      const uint64_t second = tessera::mix64(key + static_cast<uint64_t>(c + 2) * kGolden);
      const double radius = std::sqrt(-2.0 * std::log(static_cast<double>(first >> 11) * 0x1p-53 + 0x1p-53));
      const double angle = static_cast<double>(second >> 11) * 0x1p-53 * kTwoPi;
      row[c] = static_cast<float>(radius * std::cos(angle));
      if (c + 1 < dim) row[c + 1] = static_cast<float>(radius * std::sin(angle));
    }
  }
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
