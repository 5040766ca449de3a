// The counter-based generator as kernels/random.py defines it, one row at a time.
#pragma once

#include <cmath>
#include <cstdint>

#include "mix.h"
#include "multiversion.h"

namespace tessera {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ULL;

TESSERA_INLINE uint64_t random_row(uint64_t stream, int64_t id) {
  return mix64(mix64(static_cast<uint64_t>(id) + kGolden) ^ stream);
}

TESSERA_INLINE void uniform_row(uint64_t row, int64_t dim, float* __restrict out) {
  for (int64_t c = 0; c < dim; ++c) {
    const uint64_t bits = mix64(row + static_cast<uint64_t>(c + 1) * kGolden);
    out[c] = static_cast<float>(static_cast<int32_t>(bits >> 40)) * 0x1p-24f;
  }
}

// The draw of one column: 32-bit arithmetic, of which vectors hold twice as many as of 64-bit, and which is faster.
TESSERA_INLINE float draw_of(uint64_t row, int64_t column) {
  uint32_t x = static_cast<uint32_t>(row) + static_cast<uint32_t>(column + 1) * 0x9E3779B9u;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  x = (x ^ (x >> 16)) + static_cast<uint32_t>(row >> 32);
  return static_cast<float>(static_cast<int32_t>(x >> 8)) * 0x1p-24f;
}

// The multiplications that vectorise are few here beside the logarithm and the sine.
inline void normal_row(uint64_t row, int64_t dim, float* __restrict out) {
  constexpr double kTwoPi = 6.283185307179586476925286766559;
  for (int64_t c = 0; c < dim; c += 2) {
    const uint64_t first = mix64(row + static_cast<uint64_t>(c + 1) * kGolden);
    const uint64_t second = mix64(row + static_cast<uint64_t>(c + 2) * kGolden);
    const double radius = std::sqrt(-2.0 * std::log(static_cast<double>(first >> 11) * 0x1p-53 + 0x1p-53));
    const double angle = static_cast<double>(second >> 11) * 0x1p-53 * kTwoPi;
    out[c] = static_cast<float>(radius * std::cos(angle));
    if (c + 1 < dim) out[c + 1] = static_cast<float>(radius * std::sin(angle));
  }
}

}  // namespace tessera
