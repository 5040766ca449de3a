// Reading packed rows, and the fused optimizer step on them: dequantise, update, quantise. A range of rows is worked
// on block by block, so that its bytes stay in the cache from reading to writing.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>

#include "decay.h"
#include "merge.h"
#include "optimizers.h"
#include "packed.h"
#include "positions.h"

namespace {

using tessera::Batch;
using tessera::Fault;
using tessera::Format;
using tessera::Gradients;
using tessera::Hyper;
using tessera::Kind;
using tessera::Layout;
using tessera::Positions;
using tessera::Rows;

constexpr int64_t kGrain = 1 << 13;  // numbers per thread below which another thread does not pay
constexpr int64_t kBlock = 32;       // rows

TESSERA_SIMD Fault read(const Rows<char>& table, const Layout& layout, const Positions& where, int64_t begin,
                        int64_t end, int64_t last, float* out) {
  return tessera::read_rows(table, layout, where, begin, end, last, out);
}

TESSERA_SIMD void write(const Batch& batch, int64_t begin, int64_t end, const float* values) {
  tessera::write_rows(batch, begin, end, values);
}

// bf16 moments of rows [begin, end) as float32, one row of state (m, v, count) after the other; and back.
TESSERA_SIMD void read_moments(const Batch& batch, int64_t begin, int64_t end, float* state) {
  const Layout& layout = batch.layout;
  for (int64_t i = begin; i < end; ++i, state += layout.moments + 1) {
    if (batch.rows[i] < 0) continue;
    char* const row = batch.table[batch.rows[i]];
    tessera::decode<Format::kBf16>(reinterpret_cast<uint8_t*>(row) + layout.moments_at, 1, layout.moments, state);
    state[layout.moments] = *layout.state_of(row);
  }
}

TESSERA_SIMD void write_moments(const Batch& batch, int64_t begin, int64_t end, const float* state) {
  const Layout& layout = batch.layout;
  for (int64_t i = begin; i < end; ++i, state += layout.moments + 1) {
    if (batch.rows[i] < 0) continue;
    char* const row = batch.table[batch.rows[i]];
    // Always stochastic: in a step v changes by less than half a unit of bf16. The values take the first dim draws.
    const uint64_t key = tessera::random_row(batch.stream, batch.ids[i]);
    tessera::encode<Format::kBf16, false>(state, 1, key, layout.moments,
                                          reinterpret_cast<uint8_t*>(row) + layout.moments_at, layout.dim);
    *layout.state_of(row) = state[layout.moments];
  }
}

struct StepBlock {
  const Batch& batch;
  const Hyper& hyper;
  const float* grads;  // of row `begin` and those after it, as values and state are
  float* values;
  float* state;  // null: the state is float32 in the rows
};

template <typename Step, int64_t Dim>
TESSERA_INLINE void step_rows_of(const StepBlock& block, int64_t begin, int64_t end) {
  const Layout& layout = block.batch.layout;
  const int64_t dim = Dim > 0 ? Dim : layout.dim;
  for (int64_t i = begin; i < end; ++i) {
    if (block.batch.rows[i] < 0) continue;
    const int64_t k = i - begin;
    float* const state = block.state == nullptr ? layout.state_of(block.batch.table[block.batch.rows[i]])
                                                : block.state + k * (layout.moments + 1);
    Step::template step<Dim>(block.values + k * dim, state, block.grads + k * dim, dim, block.hyper);
  }
}

template <typename Step>
TESSERA_INLINE void step_rows(const StepBlock& block, int64_t begin, int64_t end) {
  switch (block.batch.layout.dim) {
    case 16: return step_rows_of<Step, 16>(block, begin, end);
    case 32: return step_rows_of<Step, 32>(block, begin, end);
    case 64: return step_rows_of<Step, 64>(block, begin, end);
    default: return step_rows_of<Step, 0>(block, begin, end);
  }
}

TESSERA_SIMD void step(const StepBlock& block, int64_t begin, int64_t end) {
  switch (block.batch.layout.optimizer) {
    case Kind::kSgd: return step_rows<tessera::Sgd>(block, begin, end);
    case Kind::kAdagrad: return step_rows<tessera::Adagrad>(block, begin, end);
    case Kind::kRowwiseAdagrad: return step_rows<tessera::RowwiseAdagrad>(block, begin, end);
    case Kind::kAdam: return step_rows<tessera::Adam>(block, begin, end);
    default: return step_rows<tessera::Ftrl>(block, begin, end);
  }
}

// What values become in their rows by nearest rounding, if the scale stays. out may be values.
template <Format F>
TESSERA_INLINE void fake_quantise_row(const float* values, float scale, int64_t dim, float* out) {
  for (int64_t c = 0; c < dim; ++c)
    out[c] = scale * static_cast<float>(tessera::to_code<F>(tessera::round_to_integer<true>(values[c] / scale, 0)));
}

TESSERA_SIMD Fault fake_quantise(const Rows<char>& table, const Layout& layout, const Positions& where, const float* held,
                              int64_t begin, int64_t end, float* out) {
  const int64_t dim = layout.dim;
  for (int64_t i = begin; i < end; ++i) {
    if (i + tessera::kAhead < end) table.prefetch(where.peek(i + tessera::kAhead), 4);
    if (where.wrong(i)) return where.fault(i);
    const int64_t row = where[i];
    if (table.beyond(row)) return table.fault(row);
    if (row < 0) {
      std::fill_n(out + i * dim, dim, 0.0f);
      continue;
    }
    const float* const values = held + (where.inverse == nullptr ? i : where.inverse[i]) * dim;
    const float size = layout.scale_of(table[row]);
    switch (layout.format) {
      case Format::kInt8: fake_quantise_row<Format::kInt8>(values, size, dim, out + i * dim); break;
      case Format::kInt4: fake_quantise_row<Format::kInt4>(values, size, dim, out + i * dim); break;
      default: fake_quantise_row<Format::kInt2>(values, size, dim, out + i * dim);
    }
  }
  return {};
}

// dw^/dD of one value, at x = w / D.
TESSERA_INLINE float slope(float x, float low, float high) {
  return x <= low ? low : x >= high ? high : std::nearbyint(x) - x;
}

// sum_c dL/dw^_c dw^_c/dD of one row.
TESSERA_INLINE float scale_gradient(const float* __restrict w, const float* __restrict g, float size, float low,
                                   float high, int64_t dim) {
  constexpr int64_t kLanes = 8;  // as in RowwiseAdagrad
  float lanes[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += g[c + lane] * slope(w[c + lane] / size, low, high);
  for (; c < dim; ++c) lanes[c % kLanes] += g[c] * slope(w[c] / size, low, high);
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// One optimizer step on the scales of rows; arguments as for `step`, values are the new ones of the rows.
template <typename Step>
TESSERA_INLINE void learn_rows(const StepBlock& block, int64_t begin, int64_t end) {
  constexpr float kLeastShrink = 0.5f;  // a scale stays above zero
  const Layout& layout = block.batch.layout;
  const auto half = static_cast<float>(1 << (tessera::bits_of(layout.format) - 1));
  for (int64_t i = begin; i < end; ++i) {
    if (block.batch.rows[i] < 0) continue;
    const int64_t k = i - begin;
    char* const row = block.batch.table[block.batch.rows[i]];
    auto* const size = reinterpret_cast<float*>(row);
    const float g =
        block.hyper.gradient_scale * scale_gradient(block.values + k * layout.dim, block.grads + k * layout.dim, *size, -half, half - 1,
                              layout.dim);
    float state[3] = {};
    std::memcpy(state, row + 4, 4 * layout.scale_state);
    float next = *size;
    Step::template step<0>(&next, state, &g, 1, block.hyper);
    std::memcpy(row + 4, state, 4 * layout.scale_state);
    *size = std::max(next, kLeastShrink * *size);
  }
}

TESSERA_SIMD void learn(const StepBlock& block, int64_t begin, int64_t end) {
  switch (block.batch.layout.optimizer) {
    case Kind::kSgd: return learn_rows<tessera::Sgd>(block, begin, end);
    case Kind::kAdagrad: return learn_rows<tessera::Adagrad>(block, begin, end);
    case Kind::kRowwiseAdagrad: return learn_rows<tessera::RowwiseAdagrad>(block, begin, end);
    default: return learn_rows<tessera::Adam>(block, begin, end);
  }
}

// Let rows [begin, end) keep what steps without gradients have left of their values, which lie one after the other.
TESSERA_SIMD void decay(const Batch& batch, int64_t begin, int64_t end, const float* kept, float l1, float* values) {
  const int64_t dim = batch.layout.dim;
  const bool ftrl = batch.layout.optimizer == Kind::kFtrl;
  for (int64_t i = begin; i < end; ++i, values += dim) {
    if (batch.rows[i] < 0) continue;
    float* const z = ftrl ? batch.layout.state_of(batch.table[batch.rows[i]]) : nullptr;
    tessera::decay_row(values, z, dim, kept[i], l1);
  }
}

at::Tensor contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->contiguous() : at::Tensor();
}

at::Tensor packed_gather(at::TensorList chunks, const at::Tensor& rows_, at::IntArrayRef numbers,
                         const std::optional<at::Tensor>& inverse_) {
  const Layout layout(numbers);
  const Rows<char> table(chunks, layout.bytes);
  const at::Tensor rows = rows_.contiguous(), inverse = contiguous(inverse_);
  const int64_t count = inverse.defined() ? inverse.numel() : rows.numel();
  at::Tensor result = at::empty({count, layout.dim}, rows.options().dtype(at::kFloat));
  const Positions where = tessera::positions_of(rows, inverse);
  float* out = result.mutable_data_ptr<float>();
  at::parallel_for(0, count, std::max<int64_t>(1, kGrain / layout.dim), [&](int64_t begin, int64_t end) {
    read(table, layout, where, begin, end, end, out + begin * layout.dim).raise();
  });
  return result;
}

at::Tensor packed_fake_quantise(at::TensorList chunks, const at::Tensor& rows_, const at::Tensor& held,
                             at::IntArrayRef numbers, const std::optional<at::Tensor>& inverse_) {
  const Layout layout(numbers);
  const Rows<char> table(chunks, layout.bytes);
  const at::Tensor rows = rows_.contiguous(), inverse = contiguous(inverse_);
  TORCH_CHECK_VALUE(held.is_contiguous() && held.numel() == rows.numel() * layout.dim && tessera::is_int(layout.format),
                    "held: expected contiguous [", rows.numel(), ", ", layout.dim, "]");
  const int64_t count = inverse.defined() ? inverse.numel() : rows.numel();
  at::Tensor result = at::empty({count, layout.dim}, held.options());
  const Positions where = tessera::positions_of(rows, inverse);
  const float* in = held.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  at::parallel_for(0, count, std::max<int64_t>(1, kGrain / layout.dim), [&](int64_t begin, int64_t end) {
    fake_quantise(table, layout, where, in, begin, end, out).raise();
  });
  return result;
}

// Tensors of an update that stay alive while it runs; merged gradients are made by the threads that use them.
struct Arguments {
  at::Tensor rows, ids, grads, inverse, sums;
  Gradients given;

  Arguments(const at::Tensor& rows_, const at::Tensor& ids_, const at::Tensor& grads_,
            const std::optional<at::Tensor>& inverse_, int64_t dim)
      : rows(rows_.contiguous()),
        ids(ids_.contiguous()),
        grads(grads_.contiguous()),
        inverse(contiguous(inverse_)),
        sums(inverse.defined() ? at::empty({rows.numel(), dim}, grads.options()) : grads),
        given{grads.const_data_ptr<float>(), inverse.defined() ? inverse.const_data_ptr<int64_t>() : nullptr,
              grads.size(0), rows.numel(), dim} {
    TORCH_CHECK_VALUE(grads.dim() == 2 && grads.size(1) == dim && ids.numel() == rows.numel(),
                      "expected grads [n, ", dim, "] and as many ids as rows");
    TORCH_CHECK_VALUE(grads.size(0) == (inverse.defined() ? inverse.numel() : rows.numel()),
                      "grads: expected as many as positions");
  }

  // Merged gradients of the rows [begin, end), as a pointer to that of row 0.
  const float* merge(int64_t begin, int64_t end) const {
    auto* const to = const_cast<float*>(sums.const_data_ptr<float>());
    if (given.inverse != nullptr) tessera::merge(given, begin, end, to + begin * given.dim).raise();
    return to;
  }
};

void packed_update(at::TensorList chunks, const at::Tensor& rows_, const at::Tensor& ids_, const at::Tensor& grads_,
                   const std::optional<at::Tensor>& inverse_, const std::optional<at::Tensor>& held,
                   at::IntArrayRef numbers, at::ArrayRef<double> settings, int64_t stream,
                   const std::optional<at::Tensor>& kept_) {
  const Layout layout(numbers);
  const Rows<char> table(chunks, layout.bytes);
  const Arguments given(rows_, ids_, grads_, inverse_, layout.dim);
  const Hyper hyper = Hyper::of(settings);
  const at::Tensor kept = contiguous(kept_);
  const int64_t count = given.rows.numel(), dim = layout.dim, width = layout.moments > 0 ? layout.moments + 1 : 0;
  TORCH_CHECK_VALUE(!held.has_value() || (held->is_contiguous() && held->numel() == count * dim),
                    "held: expected contiguous [", count, ", ", dim, "]");
  TORCH_CHECK_VALUE(!kept.defined() || kept.numel() == count, "kept: expected ", count, ", found ", kept.numel());
  float* const into = held.has_value() ? held->mutable_data_ptr<float>() : nullptr;
  const Batch batch{table, layout, given.rows.const_data_ptr<int64_t>(), given.ids.const_data_ptr<int64_t>(),
                    static_cast<uint64_t>(stream)};
  const Positions where{batch.rows, nullptr, count};
  at::parallel_for(0, count, std::max<int64_t>(1, kGrain / dim), [&](int64_t first, int64_t last) {
    const float* const grads = given.merge(first, last);
    const at::Tensor scratch = at::empty({kBlock * (dim + width)}, given.grads.options());
    float* const memory = scratch.mutable_data_ptr<float>();
    float* const state = memory + kBlock * dim;
    for (int64_t begin = first; begin < last; begin += kBlock) {
      const int64_t end = std::min(last, begin + kBlock);
      float* const values = into == nullptr ? memory : into + begin * dim;
      read(table, layout, where, begin, end, last, values).raise();
      if (width > 0) read_moments(batch, begin, end, state);
      if (kept.defined()) decay(batch, begin, end, kept.const_data_ptr<float>(), hyper.l1, values);
      step({batch, hyper, grads + begin * dim, values, width > 0 ? state : nullptr}, begin, end);
      if (into == nullptr) write(batch, begin, end, values);
      if (width > 0) write_moments(batch, begin, end, state);
    }
  });
}

void packed_learn_scales(at::TensorList chunks, const at::Tensor& rows_, const at::Tensor& ids_, const at::Tensor& grads_,
                        const std::optional<at::Tensor>& inverse_, const at::Tensor& held, at::IntArrayRef numbers,
                        at::ArrayRef<double> settings, int64_t stream) {
  const Layout layout(numbers);
  const Rows<char> table(chunks, layout.bytes);
  const Arguments given(rows_, ids_, grads_, inverse_, layout.dim);
  const Hyper hyper = Hyper::of(settings);
  const int64_t count = given.rows.numel(), dim = layout.dim;
  TORCH_CHECK_VALUE(held.is_contiguous() && held.numel() == count * dim && layout.learned &&
                        tessera::is_int(layout.format) && layout.optimizer != Kind::kFtrl,
                    "held: expected contiguous [", count, ", ", dim, "] and a layout with a learned scale");
  auto* const values = const_cast<float*>(held.const_data_ptr<float>());
  const Batch batch{table, layout, given.rows.const_data_ptr<int64_t>(), given.ids.const_data_ptr<int64_t>(),
                    static_cast<uint64_t>(stream)};
  for (int64_t i = 0; i < count; ++i)
    if (table.beyond(batch.rows[i])) table.fault(batch.rows[i]).raise();
  at::parallel_for(0, count, std::max<int64_t>(1, kGrain / dim), [&](int64_t first, int64_t last) {
    const float* const grads = given.merge(first, last);
    for (int64_t begin = first; begin < last; begin += kBlock) {
      const int64_t end = std::min(last, begin + kBlock);
      for (int64_t i = end; i < std::min(last, end + kBlock); ++i) table.prefetch(batch.rows[i], layout.bytes);
      learn({batch, hyper, grads + begin * dim, values + begin * dim, nullptr}, begin, end);
      write(batch, begin, end, values + begin * dim);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("packed_gather", &packed_gather);
  m.impl("packed_fake_quantise", &packed_fake_quantise);
  m.impl("packed_update", &packed_update);
  m.impl("packed_learn_scales", &packed_learn_scales);
}
