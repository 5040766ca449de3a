// First content of new rows, written in place.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "chunks.h"
#include "random.h"

namespace {

using tessera::kAhead;
using tessera::Rows;

constexpr int64_t kGrain = 1 << 13;  // numbers per thread below which another thread does not pay

struct Start {
  const Rows<float>& table;
  const int64_t* rows;
  const int64_t* ids;
  int64_t dim;
  bool normal;
  float offset;
  float scale;
  uint64_t stream;
  float state;
};

TESSERA_SIMD tessera::Fault write_rows(const Start& start, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) start.table.prefetch(start.rows[i + kAhead], start.table.width * 4);
    if (start.table.beyond(start.rows[i])) return start.table.fault(start.rows[i]);
    if (start.rows[i] < 0) continue;
    float* __restrict const row = start.table[start.rows[i]];
    for (int64_t c = start.dim; c < start.table.width; ++c) row[c] = start.state;
    if (start.scale == 0) {
      for (int64_t c = 0; c < start.dim; ++c) row[c] = start.offset;
      continue;
    }
    const uint64_t key = tessera::random_row(start.stream, start.ids[i]);
    if (start.normal)
      tessera::normal_row(key, start.dim, row);
    else
      tessera::uniform_row(key, start.dim, row);
    for (int64_t c = 0; c < start.dim; ++c) row[c] = start.offset + start.scale * row[c];
  }
  return {};
}

void init_rows(at::TensorList chunks, const at::Tensor& rows_, const at::Tensor& ids_, int64_t dim,
               c10::string_view distribution, at::ArrayRef<double> numbers, int64_t stream) {
  TORCH_CHECK_VALUE(numbers.size() == 3, "numbers: expected offset, scale and state");
  TORCH_CHECK_VALUE(distribution == "normal" || distribution == "uniform", "distribution: unknown name");
  const Rows<float> table(chunks, dim);
  const at::Tensor rows = rows_.contiguous(), ids = ids_.contiguous();
  TORCH_CHECK_VALUE(rows.numel() == ids.numel(), "expected as many ids as rows");
  const Start start{table,
                    rows.const_data_ptr<int64_t>(),
                    ids.const_data_ptr<int64_t>(),
                    dim,
                    distribution == "normal",
                    static_cast<float>(numbers[0]),
                    static_cast<float>(numbers[1]),
                    static_cast<uint64_t>(stream),
                    static_cast<float>(numbers[2])};
  at::parallel_for(0, rows.numel(), std::max<int64_t>(1, kGrain / dim),
                   [&](int64_t begin, int64_t end) { write_rows(start, begin, end).raise(); });
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) { m.impl("init_rows", &init_rows); }
