// Per-row time and count; rows to give up.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "chunks.h"

namespace {

using tessera::kAhead;
using tessera::Rows;

constexpr int64_t kGrain = 1 << 12;  // rows per thread below which another thread does not pay

void touch(at::TensorList chunks, const at::Tensor& rows_, const at::Tensor& now_,
           const std::optional<at::Tensor>& counts_) {
  const Rows<int64_t> table(chunks, 2);
  const at::Tensor rows = rows_.contiguous(), now = now_.contiguous();
  const at::Tensor counts = counts_.has_value() ? counts_->contiguous() : at::Tensor();
  TORCH_CHECK_VALUE(now.numel() == 1 || now.numel() == rows.numel(), "now: expected 1 or ", rows.numel(), " times");
  const int64_t* in = rows.const_data_ptr<int64_t>();
  const int64_t* time = now.const_data_ptr<int64_t>();
  const int64_t* more = counts.defined() ? counts.const_data_ptr<int64_t>() : nullptr;
  const int64_t time_step = now.numel() == 1 ? 0 : 1;
  at::parallel_for(0, rows.numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end) table.prefetch(in[i + kAhead], 16);
      if (table.beyond(in[i])) table.fault(in[i]).raise();
      if (in[i] < 0) continue;
      int64_t* const row = table[in[i]];
      const int64_t seen = time[i * time_step];
      row[0] = row[1] == 0 ? seen : std::max(row[0], seen);
      row[1] += more == nullptr ? 1 : more[i];
    }
  });
}

at::Tensor from_vector(const std::vector<int64_t>& rows, at::TensorOptions options) {
  at::Tensor result = at::empty({static_cast<int64_t>(rows.size())}, options);
  if (!rows.empty()) std::memcpy(result.mutable_data_ptr(), rows.data(), rows.size() * sizeof(int64_t));
  return result;
}

at::Tensor expired(at::TensorList chunks, int64_t limit, int64_t begin, int64_t end) {
  const Rows<int64_t> table(chunks, 2);
  TORCH_CHECK_INDEX(0 <= begin && begin <= end && end <= table.count, "the slice leaves the table");
  std::vector<int64_t> found;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t* const row = table[r];
    if (row[1] > 0 && row[0] <= limit) found.push_back(r);
  }
  return from_vector(found, chunks[0].options());
}

at::Tensor coldest(at::TensorList chunks, int64_t column, int64_t k, int64_t begin, int64_t end,
                   const std::optional<at::Tensor>& keep_) {
  const Rows<int64_t> table(chunks, 2);
  TORCH_CHECK_INDEX(0 <= begin && begin <= end && end <= table.count, "the slice leaves the table");
  std::vector<bool> keep(end - begin);
  if (keep_.has_value()) {
    const at::Tensor kept = keep_->contiguous();
    const int64_t* const rows = kept.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < kept.numel(); ++i)
      if (rows[i] >= begin && rows[i] < end) keep[rows[i] - begin] = true;
  }
  using Rank = std::tuple<int64_t, int64_t, int64_t>;
  std::vector<Rank> candidates;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t* const row = table[r];
    if (row[1] > 0 && !keep[r - begin]) candidates.emplace_back(row[column], row[1 - column], r);
  }
  const int64_t chosen = std::min<int64_t>(k, static_cast<int64_t>(candidates.size()));
  std::nth_element(candidates.begin(), candidates.begin() + chosen, candidates.end());
  std::sort(candidates.begin(), candidates.begin() + chosen);
  std::vector<int64_t> rows(chosen);
  for (int64_t i = 0; i < chosen; ++i) rows[i] = std::get<2>(candidates[i]);
  return from_vector(rows, chunks[0].options());
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("touch", &touch);
  m.impl("expired", &expired);
  m.impl("coldest", &coldest);
}
