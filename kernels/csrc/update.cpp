// Merge the gradients of a batch by row, then one fused optimizer step per row, in place.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "chunks.h"
#include "merge.h"
#include "optimizers.h"

namespace {

using tessera::Fault;
using tessera::Gradients;
using tessera::Hyper;
using tessera::Rows;
using tessera::Steps;

constexpr int64_t kGrain = 1 << 13;  // gradient elements per thread below which another thread does not pay

// Optimizers as functions over a range of rows; grads[i] belongs to rows[i].
using StepRows = Fault (*)(const Steps&, int64_t, int64_t);

TESSERA_SIMD Fault sgd(const Steps& steps, int64_t begin, int64_t end) {
  return tessera::step_rows<tessera::Sgd>(steps, begin, end);
}

TESSERA_SIMD Fault adagrad(const Steps& steps, int64_t begin, int64_t end) {
  return tessera::step_rows<tessera::Adagrad>(steps, begin, end);
}

TESSERA_SIMD Fault rowwise_adagrad(const Steps& steps, int64_t begin, int64_t end) {
  return tessera::step_rows<tessera::RowwiseAdagrad>(steps, begin, end);
}

TESSERA_SIMD Fault adam(const Steps& steps, int64_t begin, int64_t end) {
  return tessera::step_rows<tessera::Adam>(steps, begin, end);
}

TESSERA_SIMD Fault ftrl(const Steps& steps, int64_t begin, int64_t end) {
  return tessera::step_rows<tessera::Ftrl>(steps, begin, end);
}

struct Optimizer {
  const char* name;
  StepRows step;
  int64_t per_dim;  // columns of state: per_dim * dim + more
  int64_t more;
};

constexpr Optimizer kOptimizers[] = {
    {"sgd", sgd, 0, 0}, {"adagrad", adagrad, 1, 0}, {"rowwise_adagrad", rowwise_adagrad, 0, 1},
    {"adam", adam, 2, 1}, {"ftrl", ftrl, 2, 0},
};

const Optimizer& optimizer_of(c10::string_view name) {
  for (const Optimizer& one : kOptimizers)
    if (name == one.name) return one;
  TORCH_CHECK_VALUE(false, "optimizer: unknown name ", std::string(name));
}

void update(at::TensorList chunks, const at::Tensor& rows_, const at::Tensor& grads_,
            const std::optional<at::Tensor>& inverse_, c10::string_view name, double learning_rate, double weight_decay,
            double eps, double beta1, double beta2, double beta, double l1, double l2) {
  const Optimizer& optimizer = optimizer_of(name);
  TORCH_CHECK_VALUE(grads_.dim() == 2 && rows_.dim() == 1, "expected grads [n, dim] and rows [u]");
  const int64_t dim = grads_.size(1);
  const Rows<float> table(chunks, dim + optimizer.per_dim * dim + optimizer.more);
  const at::Tensor rows = rows_.contiguous(), grads = grads_.contiguous();
  const at::Tensor inverse = inverse_.has_value() ? inverse_->contiguous() : at::Tensor();
  const int64_t count = rows.numel(), n = grads.size(0);
  TORCH_CHECK_VALUE(n == (inverse.defined() ? inverse.numel() : count), "grads: expected as many as positions");
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const int64_t* at = inverse.defined() ? inverse.const_data_ptr<int64_t>() : nullptr;
  const Hyper hyper(learning_rate, weight_decay, eps, beta1, beta2, beta, l1, l2);
  const at::Tensor merged = at == nullptr ? grads : at::empty({count, dim}, grads.options());
  const Gradients given{grads.const_data_ptr<float>(), at, n, count, dim};
  float* sums = const_cast<float*>(merged.const_data_ptr<float>());
  const Steps steps{table, row, sums, dim, hyper};
  at::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, dim)), [&](int64_t begin, int64_t end) {
    if (at != nullptr) merge(given, begin, end, sums + begin * dim).raise();
    optimizer.step(steps, begin, end).raise();
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) { m.impl("update", &update); }
