// Reading and writing rows in chunks. Rows are moved as bytes: any type, any width.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "chunks.h"
#include "positions.h"

namespace {

using tessera::Fault;
using tessera::kAhead;
using tessera::Positions;
using tessera::positions_of;
using tessera::Rows;

constexpr int64_t kGrain = 1 << 15;  // bytes per thread below which another thread does not pay

int64_t grain_of(int64_t row_bytes) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row_bytes)); }

// What row -1 reads: the given default or zeros.
at::Tensor default_row(const std::optional<at::Tensor>& given, int64_t dim, at::TensorOptions options) {
  if (!given.has_value()) return at::zeros({dim}, options);
  TORCH_CHECK_VALUE(given->dim() == 1 && given->numel() == dim && given->dtype() == options.dtype(),
                    "default: expected [", dim, "] of the chunks' dtype");
  return given->contiguous();
}

struct Source {
  const Rows<char>& table;
  Positions positions;
  const char* fallback;
  int64_t begin;  // in bytes, as size
  int64_t size;
};

// Size is known while compiling for the usual widths, which turns the copy into a few moves.
template <int64_t Size>
Fault copy_rows(const Source& source, int64_t begin, int64_t end, char* out) {
  const int64_t size = Size > 0 ? Size : source.size;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) source.table.prefetch(source.positions.peek(i + kAhead), source.begin + size);
    if (source.positions.wrong(i)) return source.positions.fault(i);
    const int64_t row = source.positions[i];
    if (source.table.beyond(row)) return source.table.fault(row);
    std::memcpy(out + i * size, row < 0 ? source.fallback : source.table[row] + source.begin, size);
  }
  return {};
}

Fault copy_rows_of(const Source& source, int64_t begin, int64_t end, char* out) {
  switch (source.size) {
    case 4: return copy_rows<4>(source, begin, end, out);
    case 32: return copy_rows<32>(source, begin, end, out);
    case 64: return copy_rows<64>(source, begin, end, out);
    case 128: return copy_rows<128>(source, begin, end, out);
    case 256: return copy_rows<256>(source, begin, end, out);
    default: return copy_rows<0>(source, begin, end, out);
  }
}

at::Tensor gather(at::TensorList chunks, const at::Tensor& rows_, int64_t dim,
                  const std::optional<at::Tensor>& inverse_, const std::optional<at::Tensor>& fallback_,
                  int64_t begin) {
  const Rows<char> table(chunks, begin + dim);
  const at::Tensor rows = rows_.contiguous();
  const at::Tensor inverse = inverse_.has_value() ? inverse_->contiguous() : at::Tensor();
  const auto options = chunks.empty() ? rows.options().dtype(at::kFloat) : chunks[0].options();
  const at::Tensor fallback = default_row(fallback_, dim, options);
  const int64_t count = inverse.defined() ? inverse.numel() : rows.numel();
  at::Tensor result = at::empty({count, dim}, options);
  const int64_t item = result.element_size();
  const Source source{table, positions_of(rows, inverse),
                      static_cast<const char*>(fallback.const_data_ptr()),
                      begin * item,
                      dim * item};
  char* out = static_cast<char*>(result.mutable_data_ptr());
  at::parallel_for(0, count, grain_of(source.size),
                   [&](int64_t first, int64_t last) { copy_rows_of(source, first, last, out).raise(); });
  return result;
}

void scatter(at::TensorList chunks, const at::Tensor& rows_, const at::Tensor& values_, int64_t begin) {
  const Rows<char> table(chunks, begin + values_.size(1));
  const at::Tensor rows = rows_.contiguous(), values = values_.contiguous();
  const int64_t* in = rows.const_data_ptr<int64_t>();
  const int64_t size = values.size(1) * values.element_size();
  const int64_t step = values.size(0) == 1 ? 0 : size;
  const int64_t offset = begin * values.element_size();
  const char* from = static_cast<const char*>(values.const_data_ptr());
  at::parallel_for(0, rows.numel(), grain_of(size), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (i + kAhead < last) table.prefetch(in[i + kAhead], offset + size);
      if (table.beyond(in[i])) table.fault(in[i]).raise();
      if (in[i] >= 0) std::memcpy(table[in[i]] + offset, from + i * step, size);
    }
  });
}

// One of several tensors that lie side by side in a row.
struct Column {
  at::Tensor values;  // keeps the memory
  const char* from;
  int64_t size;  // bytes of a row
  int64_t step;  // bytes to the next row: 0 if all are alike
};

std::vector<Column> columns_of(at::TensorList parts, int64_t rows) {
  std::vector<Column> columns;
  for (const at::Tensor& part : parts) {
    TORCH_CHECK_VALUE(part.dim() == 2 && (part.size(0) == rows || part.size(0) == 1) && part.dtype() == parts[0].dtype(),
                      "parts: expected [", rows, " or 1, k] of one dtype, found ", part.sizes());
    const at::Tensor values = part.contiguous();
    const int64_t size = values.size(1) * values.element_size();
    columns.push_back({values, static_cast<const char*>(values.const_data_ptr()), size, part.size(0) == 1 ? 0 : size});
  }
  return columns;
}

void scatter_columns(at::TensorList chunks, const at::Tensor& rows_, at::TensorList parts, int64_t begin) {
  const at::Tensor rows = rows_.contiguous();
  const std::vector<Column> columns = columns_of(parts, rows.numel());
  int64_t width = 0, size = 0;
  for (const at::Tensor& part : parts) width += part.size(1);
  for (const Column& column : columns) size += column.size;
  if (width == 0 || rows.numel() == 0) return;
  const Rows<char> table(chunks, begin + width);
  const int64_t* in = rows.const_data_ptr<int64_t>();
  const int64_t offset = begin * parts[0].element_size();
  at::parallel_for(0, rows.numel(), grain_of(size), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (i + kAhead < last) table.prefetch(in[i + kAhead], offset + size);
      if (table.beyond(in[i])) table.fault(in[i]).raise();
      if (in[i] < 0) continue;
      char* to = table[in[i]] + offset;
      for (const Column& column : columns) {
        const char* const from = column.from + i * column.step;
        if (column.size == 8)
          std::memcpy(to, from, 8);
        else
          std::memcpy(to, from, column.size);
        to += column.size;
      }
    }
  });
}

void copy_rows_between(at::TensorList source, const at::Tensor& rows_, at::TensorList target, const at::Tensor& places_) {
  if (rows_.numel() == 0) return;
  const Rows<char> from(source, 0), to(target, 0);
  TORCH_CHECK_VALUE(from.width == to.width && (source.empty() || target.empty() || source[0].dtype() == target[0].dtype()),
                    "target: expected rows like those of source");
  const at::Tensor rows = rows_.contiguous(), places = places_.contiguous();
  TORCH_CHECK_VALUE(rows.numel() == places.numel(), "places: expected ", rows.numel(), ", found ", places.numel());
  const int64_t* in = rows.const_data_ptr<int64_t>();
  const int64_t* out = places.const_data_ptr<int64_t>();
  at::parallel_for(0, rows.numel(), grain_of(from.width), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (i + kAhead < last) from.prefetch(in[i + kAhead], from.width);
      TORCH_CHECK_INDEX(in[i] >= 0 && !from.beyond(in[i]), "rows: expected below ", from.count, ", found ", in[i]);
      TORCH_CHECK_INDEX(out[i] >= 0 && !to.beyond(out[i]), "places: expected below ", to.count, ", found ", out[i]);
      std::memcpy(to[out[i]], from[in[i]], from.width);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("gather", &gather);
  m.impl("scatter", &scatter);
  m.impl("scatter_columns", &scatter_columns);
  m.impl("copy_rows", &copy_rows_between);
}
