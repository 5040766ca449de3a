// Packed rows as layout.h describes them: reading and writing the values of a range of them.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

#include "chunks.h"
#include "layout.h"
#include "quantise.h"
#include "random.h"

namespace tessera {

// A range of the rows of a batch. rows: -1 is skipped; ids and stream are for stochastic rounding.
struct Batch {
  const Rows<char>& table;
  const Layout& layout;
  const int64_t* rows;
  const int64_t* ids;
  uint64_t stream;
};

template <Format F, int64_t Dim, typename Where>
TESSERA_INLINE Fault read_rows_of(const Rows<char>& table, const Layout& layout, const Where& where, int64_t begin,
                                  int64_t end, int64_t last, float* out) {
  const int64_t dim = Dim > 0 ? Dim : layout.dim;
  for (int64_t i = begin; i < end; ++i, out += dim) {
    if (i + kAhead < last) table.prefetch(where.peek(i + kAhead), layout.bytes);
    if (where.wrong(i)) return where.fault(i);
    const int64_t row = where[i];
    if (table.beyond(row)) return table.fault(row);
    if (row < 0) {
      std::fill_n(out, dim, 0.0f);
      continue;
    }
    char* const at = table[row];
    decode<F>(layout.values_of(at), layout.scale_of(at), dim, out);
  }
  return {};
}

template <Format F, typename Where>
TESSERA_INLINE Fault read_rows_in(const Rows<char>& table, const Layout& layout, const Where& where, int64_t begin,
                                  int64_t end, int64_t last, float* out) {
  switch (layout.dim) {
    case 16: return read_rows_of<F, 16>(table, layout, where, begin, end, last, out);
    case 32: return read_rows_of<F, 32>(table, layout, where, begin, end, last, out);
    case 64: return read_rows_of<F, 64>(table, layout, where, begin, end, last, out);
    default: return read_rows_of<F, 0>(table, layout, where, begin, end, last, out);
  }
}

// Values of the rows at positions [begin, end), zeros for row -1. Rows before position `last` are asked for early.
template <typename Where>
TESSERA_INLINE Fault read_rows(const Rows<char>& table, const Layout& layout, const Where& where, int64_t begin,
                               int64_t end, int64_t last, float* out) {
  switch (layout.format) {
    case Format::kFp32: return read_rows_in<Format::kFp32>(table, layout, where, begin, end, last, out);
    case Format::kFp16: return read_rows_in<Format::kFp16>(table, layout, where, begin, end, last, out);
    case Format::kBf16: return read_rows_in<Format::kBf16>(table, layout, where, begin, end, last, out);
    case Format::kInt8: return read_rows_in<Format::kInt8>(table, layout, where, begin, end, last, out);
    case Format::kInt4: return read_rows_in<Format::kInt4>(table, layout, where, begin, end, last, out);
    default: return read_rows_in<Format::kInt2>(table, layout, where, begin, end, last, out);
  }
}

template <Format F, bool Nearest, int64_t Dim>
TESSERA_INLINE void write_rows_of(const Batch& batch, int64_t begin, int64_t end, const float* values) {
  const int64_t dim = Dim > 0 ? Dim : batch.layout.dim;
  for (int64_t i = begin; i < end; ++i, values += dim) {
    if (batch.rows[i] < 0) continue;
    char* const row = batch.table[batch.rows[i]];
    const uint64_t key = Nearest ? 0 : random_row(batch.stream, batch.ids[i]);
    encode<F, Nearest>(values, batch.layout.scale_of(row), key, dim, batch.layout.values_of(row));
  }
}

template <Format F, bool Nearest>
TESSERA_INLINE void write_rows_in(const Batch& batch, int64_t begin, int64_t end, const float* values) {
  switch (batch.layout.dim) {
    case 16: return write_rows_of<F, Nearest, 16>(batch, begin, end, values);
    case 32: return write_rows_of<F, Nearest, 32>(batch, begin, end, values);
    case 64: return write_rows_of<F, Nearest, 64>(batch, begin, end, values);
    default: return write_rows_of<F, Nearest, 0>(batch, begin, end, values);
  }
}

template <Format F>
TESSERA_INLINE void write_rows_as(const Batch& batch, int64_t begin, int64_t end, const float* values) {
  if (batch.layout.nearest)
    write_rows_in<F, true>(batch, begin, end, values);
  else
    write_rows_in<F, false>(batch, begin, end, values);
}

// Store values (one row of them after the other) in the rows at [begin, end).
TESSERA_INLINE void write_rows(const Batch& batch, int64_t begin, int64_t end, const float* values) {
  switch (batch.layout.format) {
    case Format::kFp32: return write_rows_in<Format::kFp32, true>(batch, begin, end, values);
    case Format::kFp16: return write_rows_as<Format::kFp16>(batch, begin, end, values);
    case Format::kBf16: return write_rows_as<Format::kBf16>(batch, begin, end, values);
    case Format::kInt8: return write_rows_as<Format::kInt8>(batch, begin, end, values);
    case Format::kInt4: return write_rows_as<Format::kInt4>(batch, begin, end, values);
    default: return write_rows_as<Format::kInt2>(batch, begin, end, values);
  }
}

}  // namespace tessera
