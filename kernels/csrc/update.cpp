// Merge the gradients of a batch by row, then one fused optimizer step per row, in place.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "chunks.h"
#include "layout.h"
#include "merge.h"
#include "optimizers.h"

namespace {

using tessera::Fault;
using tessera::Gradients;
using tessera::Hyper;
using tessera::Kind;
using tessera::Rows;
using tessera::Steps;

constexpr int64_t kGrain = 1 << 13;  // gradient elements per thread below which another thread does not pay

TESSERA_SIMD Fault step(Kind kind, const Steps& steps, int64_t begin, int64_t end) {
  switch (kind) {
    case Kind::kSgd: return tessera::step_rows<tessera::Sgd>(steps, begin, end);
    case Kind::kAdagrad: return tessera::step_rows<tessera::Adagrad>(steps, begin, end);
    case Kind::kRowwiseAdagrad: return tessera::step_rows<tessera::RowwiseAdagrad>(steps, begin, end);
    case Kind::kAdam: return tessera::step_rows<tessera::Adam>(steps, begin, end);
    default: return tessera::step_rows<tessera::Ftrl>(steps, begin, end);
  }
}

void update(at::TensorList chunks, const at::Tensor& rows_, const at::Tensor& grads_,
            const std::optional<at::Tensor>& inverse_, at::IntArrayRef numbers, at::ArrayRef<double> settings) {
  const tessera::Layout layout(numbers);
  TORCH_CHECK_VALUE(grads_.dim() == 2 && rows_.dim() == 1, "expected grads [n, dim] and rows [u]");
  const int64_t dim = layout.dim;
  TORCH_CHECK_VALUE(grads_.size(1) == dim, "grads: expected [n, ", dim, "]");
  const Rows<float> table(chunks, layout.bytes / 4);
  const at::Tensor rows = rows_.contiguous(), grads = grads_.contiguous();
  const at::Tensor inverse = inverse_.has_value() ? inverse_->contiguous() : at::Tensor();
  const int64_t count = rows.numel(), n = grads.size(0);
  TORCH_CHECK_VALUE(n == (inverse.defined() ? inverse.numel() : count), "grads: expected as many as positions");
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const int64_t* at = inverse.defined() ? inverse.const_data_ptr<int64_t>() : nullptr;
  const Hyper hyper = Hyper::of(settings);
  const at::Tensor merged = at == nullptr ? grads : at::empty({count, dim}, grads.options());
  const Gradients given{grads.const_data_ptr<float>(), at, n, count, dim};
  float* sums = const_cast<float*>(merged.const_data_ptr<float>());
  const Steps steps{table, row, sums, dim, hyper};
  at::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, dim)), [&](int64_t begin, int64_t end) {
    if (at != nullptr) merge(given, begin, end, sums + begin * dim).raise();
    step(layout.optimizer, steps, begin, end).raise();
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) { m.impl("update", &update); }
