// Records as kernels/record_layout.py describes them, in chunks that double in size as kernels/records.py says.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "chunks.h"
#include "layout.h"
#include "multiversion.h"

namespace tessera {

constexpr int64_t kTableBits = 0xFFFFFFFF;  // of Meta::table_and_mark

struct Meta {
  int64_t last_seen, count, id;  // count 0: not in use
  int64_t table_and_mark;        // the mark in the upper half

  TESSERA_INLINE int64_t table() const { return table_and_mark & kTableBits; }
};

struct GroupLayout {
  int64_t begin;   // bytes
  int64_t column;  // of the first of its values among those of all groups
  Layout row;

  bool plain() const { return row.format == Format::kFp32 && row.moments == 0; }
};

struct RecordLayout {
  std::vector<GroupLayout> groups;
  int64_t meta_at, bytes;
  int64_t decay_at, decay_floats;  // float64: how far the row is decayed, and its exponent; 0 of them: it is not
  int64_t width = 0;
  bool plain = true;  // values of all groups are float32 side by side, at the begin

  explicit RecordLayout(at::IntArrayRef numbers) {
    constexpr size_t kOfGroup = 13;
    constexpr size_t kFirst = 5;
    TORCH_CHECK_VALUE(numbers.size() >= kFirst && numbers[0] >= 1 &&
                          numbers.size() == kFirst + kOfGroup * static_cast<size_t>(numbers[0]),
                      "layout: expected 5 numbers and 13 for each group, found ", numbers.size());
    meta_at = numbers[1], bytes = numbers[2], decay_at = numbers[3], decay_floats = numbers[4];
    TORCH_CHECK_VALUE(decay_floats >= 0 && decay_floats <= 2 && decay_at >= 0 && decay_at % 8 == 0 &&
                          decay_at + 8 * decay_floats <= meta_at,
                      "layout: a record has no place for ", decay_floats, " numbers at ", decay_at);
    TORCH_CHECK_VALUE(meta_at >= 0 && meta_at % 8 == 0 && bytes % 16 == 0 &&
                          meta_at + static_cast<int64_t>(sizeof(Meta)) <= bytes,
                      "layout: a record of ", bytes, " bytes has no place at ", meta_at);
    for (size_t at = kFirst; at < numbers.size(); at += kOfGroup) {
      groups.push_back({numbers[at], width, Layout(numbers.slice(at + 1, kOfGroup - 1))});
      const GroupLayout& group = groups.back();
      TORCH_CHECK_VALUE(group.begin >= 0 && group.begin % 4 == 0 && group.begin + group.row.bytes <= meta_at,
                        "layout: a group leaves its record");
      plain = plain && group.plain() && group.row.values_at == 4 * width;
      width += group.row.dim;
    }
  }
};

// Chunks of uint8 [rows, bytes]: the first of 2^k rows, each further one as many as all before it, until one has as
// many as the one before; from there on all have that many.
struct Records {
  static constexpr int64_t kDoubling = 62;

  std::vector<char*> bases;  // of each chunk, less the rows before it
  int64_t bytes = 0, meta_at = 0;
  int64_t count = 0;
  int64_t first_shift = 0, last_shift = kDoubling;  // of the rows of the first chunk and of the last ones

  Records(at::TensorList chunks, const RecordLayout& layout) : bytes(layout.bytes), meta_at(layout.meta_at) {
    for (const at::Tensor& chunk : chunks) {
      TORCH_CHECK_VALUE(chunk.dim() == 2 && chunk.size(1) == bytes && chunk.is_contiguous() &&
                            chunk.scalar_type() == at::kByte,
                        "chunks: expected contiguous uint8 [rows, ", bytes, "], found ", chunk.sizes());
      const int64_t rows = chunk.size(0);
      const bool first = bases.empty(), ends = !first && last_shift == kDoubling && rows != count;
      TORCH_CHECK_VALUE((first && rows > 0 && (rows & (rows - 1)) == 0) || (ends && 2 * rows == count) ||
                            (!first && !ends && rows == std::min(count, int64_t{1} << last_shift)),
                        "chunks: expected a power of two, then as many rows as before, found ", rows, " after ", count);
      if (first) first_shift = 63 - __builtin_clzll(rows);
      if (ends) last_shift = 63 - __builtin_clzll(rows);
      bases.push_back(static_cast<char*>(chunk.data_ptr()) - count * bytes);
      count += rows;
    }
  }

  TESSERA_INLINE char* operator[](int64_t row) const {
    const int64_t small = 63 - __builtin_clzll(((static_cast<uint64_t>(row) >> first_shift) << 1) | 1);
    const int64_t large = last_shift - first_shift + (row >> last_shift);
    return bases[(row >> last_shift) == 0 ? small : large] + row * bytes;
  }
  TESSERA_INLINE Meta* meta(int64_t row) const { return reinterpret_cast<Meta*>((*this)[row] + meta_at); }

  TESSERA_INLINE bool beyond(int64_t row) const { return __builtin_expect(row >= count, 0); }
  Fault fault(int64_t row) const { return {"rows", row, count}; }

  // Ask for [begin, end) of a record that is needed soon, if there is such a row.
  TESSERA_INLINE void prefetch(int64_t row, int64_t begin, int64_t end) const {
    if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(count)) return;
    const char* const at = (*this)[row];
    for (int64_t offset = begin; offset < std::min(end, begin + kMostAhead); offset += 64) __builtin_prefetch(at + offset, 1);
    __builtin_prefetch(at + end - 1, 1);
  }
};

// The stream of random rounding at a step, from what seed and table give (kernels/random.py).
TESSERA_INLINE uint64_t stream_at(int64_t base, int64_t step) {
  return mix64(static_cast<uint64_t>(base) + static_cast<uint64_t>(step) + kGolden);
}

}  // namespace tessera
