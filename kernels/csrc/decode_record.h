// What reading and updating records share: how many each thread takes, and taking out a group's values.
#pragma once

#include <algorithm>
#include <cstdint>

#include "quantise.h"
#include "records.h"

namespace tessera {

constexpr int64_t kGrain = 1 << 13;  // numbers per thread below which another thread does not pay
constexpr int64_t kBlock = 32;       // rows that stay in the cache from reading to writing
static_assert(kBlock <= kAhead);     // a block's rows have been asked for when it begins

inline int64_t grain_of(const RecordLayout& layout) { return std::max<int64_t>(kBlock, kGrain / layout.width); }

TESSERA_INLINE void decode_row(const GroupLayout& group, char* record, float* out) {
  char* const row = record + group.begin;
  const Layout& layout = group.row;
  const uint8_t* const stored = layout.values_of(row);
  switch (layout.format) {
    case Format::kFp32: return decode<Format::kFp32>(stored, 1, layout.dim, out);
    case Format::kFp16: return decode<Format::kFp16>(stored, 1, layout.dim, out);
    case Format::kBf16: return decode<Format::kBf16>(stored, 1, layout.dim, out);
    case Format::kInt8: return decode<Format::kInt8>(stored, layout.scale_of(row), layout.dim, out);
    case Format::kInt4: return decode<Format::kInt4>(stored, layout.scale_of(row), layout.dim, out);
    default: return decode<Format::kInt2>(stored, layout.scale_of(row), layout.dim, out);
  }
}

}  // namespace tessera
