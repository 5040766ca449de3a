// Tensors of values to storage form and back: rows are independent, threads share them out.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "quantise.h"
#include "random.h"

namespace {

using tessera::Format;

constexpr int64_t kGrain = 1 << 13;  // numbers per thread below which another thread does not pay

struct Work {
  Format format;
  int64_t dim;
  int64_t bytes;       // of a stored row
  const float* scales;  // null: none
  const int64_t* ids;
  uint64_t stream;
  bool nearest;
};

TESSERA_INLINE float scale_of(const Work& work, int64_t row) { return work.scales == nullptr ? 1.0f : work.scales[row]; }

template <Format F, bool Nearest>
TESSERA_INLINE void quantise_as(const Work& work, const float* in, int64_t begin, int64_t end, uint8_t* out) {
  for (int64_t i = begin; i < end; ++i) {
    const uint64_t key = Nearest ? 0 : tessera::random_row(work.stream, work.ids[i]);
    tessera::encode<F, Nearest>(in + i * work.dim, scale_of(work, i), key, work.dim, out + i * work.bytes);
  }
}

template <Format F>
TESSERA_INLINE void quantise_in(const Work& work, const float* in, int64_t begin, int64_t end, uint8_t* out) {
  if (work.nearest)
    quantise_as<F, true>(work, in, begin, end, out);
  else
    quantise_as<F, false>(work, in, begin, end, out);
}

TESSERA_SIMD void quantise_rows(const Work& work, const float* in, int64_t begin, int64_t end, uint8_t* out) {
  switch (work.format) {
    case Format::kFp32: return quantise_as<Format::kFp32, true>(work, in, begin, end, out);
    case Format::kFp16: return quantise_in<Format::kFp16>(work, in, begin, end, out);
    case Format::kBf16: return quantise_in<Format::kBf16>(work, in, begin, end, out);
    case Format::kInt8: return quantise_in<Format::kInt8>(work, in, begin, end, out);
    case Format::kInt4: return quantise_in<Format::kInt4>(work, in, begin, end, out);
    default: return quantise_in<Format::kInt2>(work, in, begin, end, out);
  }
}

template <Format F>
TESSERA_INLINE void dequantise_in(const Work& work, const uint8_t* in, int64_t begin, int64_t end, float* out) {
  for (int64_t i = begin; i < end; ++i)
    tessera::decode<F>(in + i * work.bytes, scale_of(work, i), work.dim, out + i * work.dim);
}

TESSERA_SIMD void dequantise_rows(const Work& work, const uint8_t* in, int64_t begin, int64_t end, float* out) {
  switch (work.format) {
    case Format::kFp32: return dequantise_in<Format::kFp32>(work, in, begin, end, out);
    case Format::kFp16: return dequantise_in<Format::kFp16>(work, in, begin, end, out);
    case Format::kBf16: return dequantise_in<Format::kBf16>(work, in, begin, end, out);
    case Format::kInt8: return dequantise_in<Format::kInt8>(work, in, begin, end, out);
    case Format::kInt4: return dequantise_in<Format::kInt4>(work, in, begin, end, out);
    default: return dequantise_in<Format::kInt2>(work, in, begin, end, out);
  }
}

at::ScalarType dtype_of(Format format) {
  if (tessera::is_int(format)) return at::kByte;
  return format == Format::kFp32 ? at::kFloat : format == Format::kFp16 ? at::kHalf : at::kBFloat16;
}

at::Tensor scales_of(const std::optional<at::Tensor>& given, Format format, int64_t rows) {
  TORCH_CHECK_VALUE(given.has_value() ? given->numel() == rows : !tessera::is_int(format),
                    "scales: expected ", rows, " float32");
  return given.has_value() ? given->contiguous() : at::Tensor();
}

at::Tensor quantise(const at::Tensor& values_, const std::optional<at::Tensor>& scales_, int64_t number,
                    const at::Tensor& ids_, int64_t stream, c10::string_view rounding) {
  const Format format = tessera::format_of(number);
  const at::Tensor values = values_.contiguous(), ids = ids_.contiguous();
  const int64_t n = values.size(0), dim = values.size(1), bytes = tessera::stored_bytes(format, dim);
  const at::Tensor scales = scales_of(scales_, format, n);
  TORCH_CHECK_VALUE(rounding == "nearest" || rounding == "stochastic", "rounding: unknown name");
  const bool nearest = rounding == "nearest" || format == Format::kFp32;
  TORCH_CHECK_VALUE(nearest || ids.numel() == n, "ids: expected as many as rows");
  at::Tensor result = at::empty({n, tessera::is_int(format) ? bytes : dim}, values.options().dtype(dtype_of(format)));
  const Work work{format, dim, bytes, scales.defined() ? scales.const_data_ptr<float>() : nullptr,
                  nearest ? nullptr : ids.const_data_ptr<int64_t>(), static_cast<uint64_t>(stream), nearest};
  const float* in = values.const_data_ptr<float>();
  auto* out = static_cast<uint8_t*>(result.mutable_data_ptr());
  at::parallel_for(0, n, std::max<int64_t>(1, kGrain / dim), [&](int64_t begin, int64_t end) {
    quantise_rows(work, in, begin, end, out);
  });
  return result;
}

at::Tensor dequantise(const at::Tensor& stored_, const std::optional<at::Tensor>& scales_, int64_t number, int64_t dim) {
  const Format format = tessera::format_of(number);
  const at::Tensor stored = stored_.contiguous();
  const int64_t n = stored.size(0), bytes = tessera::stored_bytes(format, dim);
  TORCH_CHECK_VALUE(dim >= 1 && stored.size(1) * stored.element_size() == bytes, "stored: expected ", bytes, " bytes");
  const at::Tensor scales = scales_of(scales_, format, n);
  at::Tensor result = at::empty({n, dim}, stored.options().dtype(at::kFloat));
  const Work work{format, dim, bytes, scales.defined() ? scales.const_data_ptr<float>() : nullptr, nullptr, 0, true};
  const auto* in = static_cast<const uint8_t*>(stored.const_data_ptr());
  float* out = result.mutable_data_ptr<float>();
  at::parallel_for(0, n, std::max<int64_t>(1, kGrain / dim),
                   [&](int64_t begin, int64_t end) { dequantise_rows(work, in, begin, end, out); });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("quantise", &quantise);
  m.impl("dequantise", &dequantise);
}
