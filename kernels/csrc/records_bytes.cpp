// Reading and writing bytes of records as they lie in memory.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "records.h"

namespace {

using tessera::Fault;
using tessera::kAhead;
using tessera::RecordLayout;
using tessera::Records;

constexpr int64_t kGrain = 1 << 15;  // bytes per thread below which another thread does not pay

int64_t grain_of(int64_t size) { return std::max<int64_t>(1, kGrain / size); }

Fault read_range(const Records& records, const int64_t* rows, int64_t first, int64_t last, int64_t begin, int64_t size,
                 uint8_t* out) {
  for (int64_t i = first; i < last; ++i) {
    if (i + kAhead < last) records.prefetch(rows[i + kAhead], begin, begin + size);
    if (records.beyond(rows[i])) return records.fault(rows[i]);
    if (rows[i] < 0)
      std::memset(out + i * size, 0, size);
    else
      std::memcpy(out + i * size, records[rows[i]] + begin, size);
  }
  return {};
}

void check_bytes(const RecordLayout& layout, int64_t begin, int64_t size) {
  TORCH_CHECK_VALUE(begin >= 0 && size > 0 && begin + size <= layout.bytes, "bytes: expected inside [0, ", layout.bytes,
                    "), found [", begin, ", ", begin + size, ")");
}

at::Tensor records_read(at::TensorList chunks, const at::Tensor& rows_, at::IntArrayRef numbers, int64_t begin,
                        int64_t size) {
  const RecordLayout layout(numbers);
  const Records records(chunks, layout);
  check_bytes(layout, begin, size);
  const at::Tensor rows = rows_.contiguous();
  at::Tensor result = at::empty({rows.numel(), size}, rows.options().dtype(at::kByte));
  auto* const out = result.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, rows.numel(), grain_of(size), [&](int64_t first, int64_t last) {
    read_range(records, rows.const_data_ptr<int64_t>(), first, last, begin, size, out).raise();
  });
  return result;
}

Fault write_range(const Records& records, const int64_t* rows, int64_t first, int64_t last, int64_t begin,
                  const at::Tensor& stored) {
  const int64_t size = stored.size(1), step = stored.size(0) == 1 ? 0 : size;
  const auto* const from = stored.const_data_ptr<uint8_t>();
  for (int64_t i = first; i < last; ++i) {
    if (i + kAhead < last) records.prefetch(rows[i + kAhead], begin, begin + size);
    if (records.beyond(rows[i])) return records.fault(rows[i]);
    if (rows[i] >= 0) std::memcpy(records[rows[i]] + begin, from + i * step, size);
  }
  return {};
}

void records_write(at::TensorList chunks, const at::Tensor& rows_, const at::Tensor& stored_, at::IntArrayRef numbers,
                   int64_t begin) {
  const RecordLayout layout(numbers);
  const Records records(chunks, layout);
  const at::Tensor rows = rows_.contiguous(), stored = stored_.contiguous();
  TORCH_CHECK_VALUE(stored.dim() == 2 && (stored.size(0) == 1 || stored.size(0) == rows.numel()),
                    "stored: expected [", rows.numel(), " or 1, bytes], found ", stored.sizes());
  check_bytes(layout, begin, stored.size(1));
  at::parallel_for(0, rows.numel(), grain_of(stored.size(1)), [&](int64_t first, int64_t last) {
    write_range(records, rows.const_data_ptr<int64_t>(), first, last, begin, stored).raise();
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("records_read", &records_read);
  m.impl("records_write", &records_write);
}
