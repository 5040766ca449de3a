// Packed rows as kernels/formats.py lays them out, and reading and writing the values of a range of them.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

#include "chunks.h"
#include "quantise.h"
#include "random.h"

namespace tessera {

struct Layout {
  Format format;
  int64_t dim, step_state, state_floats, moments, bytes;
  int64_t state_at, moments_at, values_at;  // byte offsets; the step size is at 0, its state at 4

  explicit Layout(at::IntArrayRef numbers) {
    TORCH_CHECK_VALUE(numbers.size() == 6, "layout: expected 6 numbers, found ", numbers.size());
    format = format_of(numbers[0]);
    dim = numbers[1], step_state = numbers[2], state_floats = numbers[3], moments = numbers[4], bytes = numbers[5];
    state_at = is_int(format) ? 4 * (1 + step_state) : 0;
    moments_at = state_at + 4 * state_floats;
    values_at = moments_at + 2 * moments;
    TORCH_CHECK_VALUE(dim >= 1 && step_state >= 0 && state_floats >= 0 && moments >= 0 &&
                          values_at + stored_bytes(format, dim) <= bytes,
                      "layout: ", bytes, " bytes do not hold a row of ", dim, " values");
  }

  // 1 where values have no step size.
  TESSERA_INLINE float step_of(const char* row) const {
    return is_int(format) ? *reinterpret_cast<const float*>(row) : 1.0f;
  }
  TESSERA_INLINE float* state_of(char* row) const { return reinterpret_cast<float*>(row + state_at); }
  TESSERA_INLINE uint8_t* values_of(char* row) const { return reinterpret_cast<uint8_t*>(row + values_at); }
};

// A range of the rows of a batch. rows: -1 is skipped; ids and stream are for stochastic rounding.
struct Batch {
  const Rows<char>& table;
  const Layout& layout;
  const int64_t* rows;
  const int64_t* ids;
  uint64_t stream;
  bool nearest;
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
    decode<F>(layout.values_of(at), layout.step_of(at), dim, out);
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
    encode<F, Nearest>(values, batch.layout.step_of(row), key, dim, batch.layout.values_of(row));
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
  if (batch.nearest)
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
