// Reading the values of records: all groups of a row side by side.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>

#include "decay.h"
#include "decode_record.h"
#include "positions.h"
#include "records.h"

namespace {

using tessera::Decay;
using tessera::Fault;
using tessera::GroupLayout;
using tessera::kAhead;
using tessera::Positions;
using tessera::RecordLayout;
using tessera::Records;

struct Source {
  const Records& records;
  const RecordLayout& layout;
  Positions positions;
  int64_t last;  // positions before it are asked for early
  Decay decay;
};

template <int64_t Size, bool Decays>
TESSERA_INLINE Fault copy_values(const Source& source, int64_t begin, int64_t end, float* out) {
  const int64_t size = Size > 0 ? Size : 4 * source.layout.width;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < source.last)
      source.records.prefetch(source.positions.peek(i + kAhead), 0, Decays ? source.layout.bytes : size);
    if (source.positions.wrong(i)) return source.positions.fault(i);
    const int64_t row = source.positions[i];
    if (source.records.beyond(row)) return source.records.fault(row);
    float* const to = out + i * (size / 4);
    if (row < 0) {
      std::memset(to, 0, size);
    } else if constexpr (Decays) {
      const char* const record = source.records[row];
      const float kept = source.decay.factor_of(record);
      const auto* const values = reinterpret_cast<const float*>(record);
      for (int64_t c = 0; c < size / 4; ++c) to[c] = values[c] * kept;
    } else {
      std::memcpy(to, source.records[row], size);
    }
  }
  return {};
}

// Sizes known while compiling become a few moves: dims 8, 16, 32 and 64, alone and with a group of one value.
template <bool Decays>
TESSERA_INLINE Fault copy_values_in(const Source& source, int64_t begin, int64_t end, float* out) {
  switch (source.layout.width) {
    case 8: return copy_values<32, Decays>(source, begin, end, out);
    case 9: return copy_values<36, Decays>(source, begin, end, out);
    case 16: return copy_values<64, Decays>(source, begin, end, out);
    case 17: return copy_values<68, Decays>(source, begin, end, out);
    case 32: return copy_values<128, Decays>(source, begin, end, out);
    case 33: return copy_values<132, Decays>(source, begin, end, out);
    case 64: return copy_values<256, Decays>(source, begin, end, out);
    case 65: return copy_values<260, Decays>(source, begin, end, out);
    default: return copy_values<0, Decays>(source, begin, end, out);
  }
}

Fault copy_values_of(const Source& source, int64_t begin, int64_t end, float* out) {
  return copy_values_in<false>(source, begin, end, out);
}

TESSERA_SIMD Fault copy_decayed(const Source& source, int64_t begin, int64_t end, float* out) {
  return copy_values_in<true>(source, begin, end, out);
}

TESSERA_SIMD Fault decode_rows(const Source& source, int64_t begin, int64_t end, float* out) {
  const int64_t width = source.layout.width;
  const int64_t read = source.decay.sums == nullptr ? source.layout.meta_at : source.layout.bytes;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < source.last) source.records.prefetch(source.positions.peek(i + kAhead), 0, read);
    if (source.positions.wrong(i)) return source.positions.fault(i);
    const int64_t row = source.positions[i];
    if (source.records.beyond(row)) return source.records.fault(row);
    if (row < 0) {
      std::fill_n(out + i * width, width, 0.0f);
      continue;
    }
    char* const record = source.records[row];
    for (const GroupLayout& group : source.layout.groups) tessera::decode_row(group, record, out + i * width + group.column);
    if (source.decay.sums == nullptr) continue;
    const float kept = source.decay.factor_of(record);
    for (int64_t c = 0; c < width; ++c) out[i * width + c] *= kept;
  }
  return {};
}

at::Tensor records_gather(at::TensorList chunks, const at::Tensor& rows_, at::IntArrayRef numbers,
                          const std::optional<at::Tensor>& inverse_, const std::optional<at::Tensor>& decayed) {
  const RecordLayout layout(numbers);
  const Records records(chunks, layout);
  const Decay decay(decayed, layout);
  const at::Tensor rows = rows_.contiguous(), inverse = inverse_.has_value() ? inverse_->contiguous() : at::Tensor();
  const int64_t count = inverse.defined() ? inverse.numel() : rows.numel();
  at::Tensor result = at::empty({count, layout.width}, rows.options().dtype(at::kFloat));
  float* const out = result.mutable_data_ptr<float>();
  const Positions positions = tessera::positions_of(rows, inverse);
  at::parallel_for(0, count, tessera::grain_of(layout), [&](int64_t begin, int64_t end) {
    const Source source{records, layout, positions, end, decay};
    if (!layout.plain) return decode_rows(source, begin, end, out).raise();
    (decay.sums == nullptr ? copy_values_of(source, begin, end, out) : copy_decayed(source, begin, end, out)).raise();
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) { m.impl("records_gather", &records_gather); }
