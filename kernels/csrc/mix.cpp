// mix64 and its inverse over whole tensors.
#include "mix.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "multiversion.h"

namespace {

constexpr int64_t kGrain = 1 << 15;  // numbers per thread below which another thread does not pay

TESSERA_SIMD void mix_range(const int64_t* in, int64_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int64_t>(tessera::mix64(static_cast<uint64_t>(in[i])));
}

TESSERA_SIMD void unmix_range(const int64_t* in, int64_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int64_t>(tessera::unmix64(static_cast<uint64_t>(in[i])));
}

template <typename Range>
at::Tensor over(const at::Tensor& x, Range range) {
  const at::Tensor source = x.contiguous();
  at::Tensor result = at::empty(source.sizes(), source.options());
  const int64_t* in = source.const_data_ptr<int64_t>();
  int64_t* out = result.mutable_data_ptr<int64_t>();
  at::parallel_for(0, source.numel(), kGrain,
                   [&](int64_t begin, int64_t end) { range(in + begin, out + begin, end - begin); });
  return result;
}

at::Tensor mix64(const at::Tensor& x) { return over(x, mix_range); }

at::Tensor unmix64(const at::Tensor& x) { return over(x, unmix_range); }

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("mix64", &mix64);
  m.impl("unmix64", &unmix64);
}
