// Decay of rows in every step, at the cost of those that are touched: embedding/decay.py has the rule.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "multiversion.h"
#include "records.h"

namespace tessera {

// How much of their values rows keep, where tables decay: sums of log(1 - rate decay) over the steps of each table.
struct Decay {
  const double* sums = nullptr;  // null: rows keep all
  int64_t tables = 0, at = 0, floats = 0, meta_at = 0;

  Decay() = default;
  Decay(const std::optional<at::Tensor>& sums_, const RecordLayout& layout)
      : at(layout.decay_at), floats(layout.decay_floats), meta_at(layout.meta_at) {
    TORCH_CHECK_VALUE(sums_.has_value() == (floats > 0), "decayed: expected where records know how far they are decayed");
    if (!sums_.has_value()) return;
    TORCH_CHECK_VALUE(sums_->scalar_type() == at::kDouble && sums_->dim() == 1 && sums_->numel() > 0 &&
                          sums_->is_contiguous(),
                      "decayed: expected contiguous float64 [tables]");
    sums = sums_->const_data_ptr<double>(), tables = sums_->numel();
  }

  TESSERA_INLINE double sum_of(const char* record) const {
    const int64_t table = reinterpret_cast<const Meta*>(record + meta_at)->table();
    return sums[std::min(table, tables - 1)];
  }
  TESSERA_INLINE float factor_of(const char* record) const {
    const auto* const seen = reinterpret_cast<const double*>(record + at);
    const double since = sum_of(record) - seen[0];
    return static_cast<float>(std::exp(floats == 2 ? since * seen[1] : since));
  }
  TESSERA_INLINE void set(char* record, double power) const {
    auto* const seen = reinterpret_cast<double*>(record + at);
    seen[0] = sum_of(record);
    const auto& meta = *reinterpret_cast<const Meta*>(record + meta_at);
    if (floats == 2) seen[1] = std::pow(static_cast<double>(meta.count), -power);
  }
};

// Let a row keep a part of its values. z: of FTRL, whose values follow from it: of what lies beyond l1 the same part is
// kept; null for other optimizers.
TESSERA_INLINE void decay_row(float* values, float* z, int64_t dim, float kept, float l1) {
  for (int64_t c = 0; c < dim; ++c) values[c] *= kept;
  if (z == nullptr) return;
  for (int64_t c = 0; c < dim; ++c) {
    const float bound = std::copysign(l1, z[c]);
    z[c] = std::fabs(z[c]) <= l1 ? z[c] : bound + kept * (z[c] - bound);
  }
}

}  // namespace tessera
