// Rounding of one row to a format of low precision and back, as kernels/quantise.py defines it.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "multiversion.h"
#include "random.h"

namespace tessera {

enum class Format : int64_t { kFp32, kFp16, kBf16, kInt8, kInt4, kInt2 };

constexpr int bits_of(Format format) {
  constexpr int kBits[] = {32, 16, 16, 8, 4, 2};
  return kBits[static_cast<int>(format)];
}
constexpr bool is_int(Format format) { return format >= Format::kInt8; }

inline Format format_of(int64_t number) {
  TORCH_CHECK_VALUE(number >= 0 && number <= static_cast<int64_t>(Format::kInt2), "format: unknown number ", number);
  return static_cast<Format>(number);
}

// Bytes of dim values.
inline int64_t stored_bytes(Format format, int64_t dim) { return (dim * bits_of(format) + 7) / 8; }

TESSERA_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

TESSERA_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <bool Nearest>
TESSERA_INLINE float round_to_integer(float x, float draw) {
  if constexpr (Nearest) return std::nearbyint(x);
  const float below = std::floor(x);
  return below + (draw < x - below ? 1.0f : 0.0f);
}

template <Format F>
TESSERA_INLINE int32_t to_code(float rounded) {
  constexpr float kHigh = static_cast<float>((1 << (bits_of(F) - 1)) - 1), kLow = -kHigh - 1;
  return static_cast<int32_t>(std::min(kHigh, std::max(kLow, rounded)));
}

// The multiple of its format's spacing that a float becomes.
template <Format F, bool Nearest>
TESSERA_INLINE float to_grid(float x, float draw) {
  constexpr bool kHalf = F == Format::kFp16;
  constexpr uint32_t kMantissa = (kHalf ? 10u : 7u) << 23, kLowest = (kHalf ? 113u : 14u) << 23;
  const float most = kHalf ? 65504.0f : from_bits(0x7F7F0000u);
  const uint32_t spacing = std::max(to_bits(x) & 0x7F800000u, kLowest) - kMantissa;
  const float inverse = from_bits((254u << 23) - spacing);
  const float rounded = round_to_integer<Nearest>(x * inverse, draw) * from_bits(spacing);
  return std::min(most, std::max(-most, rounded));
}

// fp16 of a float that fp16 holds exactly, and back; by integer arithmetic, which vectorises everywhere.
TESSERA_INLINE uint32_t to_half(float x) {
  const uint32_t bits = to_bits(x), size = bits & 0x7FFFFFFFu;
  const auto small = static_cast<uint32_t>(static_cast<int32_t>(from_bits(size) * 0x1p24f));
  const uint32_t normal = (size - (112u << 23)) >> 13;
  return (bits >> 16 & 0x8000u) | (size < (113u << 23) ? small : normal);
}

TESSERA_INLINE float from_half(uint32_t half) {
  const uint32_t size = half & 0x7FFFu;
  const float small = static_cast<float>(static_cast<int32_t>(size)) * 0x1p-24f;
  const uint32_t normal = (size << 13) + (112u << 23);
  return from_bits((size < 0x400u ? to_bits(small) : normal) | (half & 0x8000u) << 16);
}

// Codes of less than a byte: Lane holds those of one byte, each in a byte of its own. Shifts move all of a vector.
template <Format F>
struct Packing {
  static constexpr int kBits = bits_of(F), kPerByte = 8 / kBits;
  using Lane = std::conditional_t<kPerByte == 2, uint16_t, uint32_t>;

  static TESSERA_INLINE uint8_t pack(Lane codes) {
    uint32_t byte = codes;
    for (int k = 1; k < kPerByte; ++k) byte |= static_cast<uint32_t>(codes) >> k * (8 - kBits);
    return static_cast<uint8_t>(byte);
  }
  static TESSERA_INLINE Lane unpack(uint8_t byte) {
    uint32_t codes = byte;
    for (int k = 1; k < kPerByte; ++k) codes |= static_cast<uint32_t>(byte) << k * (8 - kBits);
    return static_cast<Lane>(codes & (kPerByte == 2 ? 0x0F0Fu : 0x03030303u));
  }
};

constexpr int64_t kTile = 64;  // values between arithmetic and storage

// Narrow numbers to the type that is stored and back, apart from the arithmetic: a loop over both would work on short
// vectors of the wide type.
template <typename To, typename From>
TESSERA_INLINE void convert(const From* __restrict in, int64_t count, To* __restrict out) {
  for (int64_t c = 0; c < count; ++c) out[c] = static_cast<To>(in[c]);
}

// Values of a row from its storage. dim is a constant wherever the caller knows one.
template <Format F>
TESSERA_INLINE void decode(const uint8_t* __restrict stored, float scale, int64_t dim, float* __restrict out) {
  if constexpr (F == Format::kFp32) {
    std::memcpy(out, stored, dim * 4);
    return;
  }
  int32_t wide[kTile];
  for (int64_t first = 0; first < dim; first += kTile) {
    const int64_t count = std::min(kTile, dim - first);
    if constexpr (F == Format::kFp16 || F == Format::kBf16) {
      convert(reinterpret_cast<const uint16_t*>(stored) + first, count, wide);
      for (int64_t c = 0; c < count; ++c)
        out[first + c] = F == Format::kFp16 ? from_half(static_cast<uint32_t>(wide[c]))
                                            : from_bits(static_cast<uint32_t>(wide[c]) << 16);
      continue;
    }
    if constexpr (F == Format::kInt8) {
      convert(reinterpret_cast<const int8_t*>(stored) + first, count, wide);
    } else if constexpr (is_int(F)) {
      constexpr int kPerByte = Packing<F>::kPerByte, kHalf = 1 << (bits_of(F) - 1);
      typename Packing<F>::Lane lanes[kTile / kPerByte] = {};
      for (int64_t j = 0; j < (count + kPerByte - 1) / kPerByte; ++j)
        lanes[j] = Packing<F>::unpack(stored[first / kPerByte + j]);
      uint8_t codes[kTile];
      std::memcpy(codes, lanes, sizeof codes);
      convert(codes, count, wide);
      for (int64_t c = 0; c < count; ++c) wide[c] = (wide[c] ^ kHalf) - kHalf;
    }
    for (int64_t c = 0; c < count; ++c) out[first + c] = scale * static_cast<float>(wide[c]);
  }
}

// A row's values into storage. key (random_row of the row) and the column, counted from `first_draw`, give the random draws.
template <Format F, bool Nearest>
TESSERA_INLINE void encode(const float* __restrict w, float scale, uint64_t key, int64_t dim, uint8_t* __restrict stored,
                           int64_t first_draw = 0) {
  if constexpr (F == Format::kFp32) {
    std::memcpy(stored, w, dim * 4);
    return;
  }
  int32_t wide[kTile];
  for (int64_t first = 0; first < dim; first += kTile) {
    const int64_t count = std::min(kTile, dim - first);
    for (int64_t c = 0; c < count; ++c) {
      const float draw = Nearest ? 0.0f : draw_of(key, first_draw + first + c);
      if constexpr (is_int(F)) {
        wide[c] = to_code<F>(round_to_integer<Nearest>(w[first + c] / scale, draw));
      } else {
        const float x = to_grid<F, Nearest>(w[first + c], draw);
        wide[c] = static_cast<int32_t>(F == Format::kFp16 ? to_half(x) : to_bits(x) >> 16);
      }
    }
    if constexpr (!is_int(F)) {
      convert(wide, count, reinterpret_cast<uint16_t*>(stored) + first);
    } else if constexpr (F == Format::kInt8) {
      convert(wide, count, stored + first);
    } else {
      constexpr int kPerByte = Packing<F>::kPerByte, kMask = (1 << bits_of(F)) - 1;
      for (int64_t c = 0; c < count; ++c) wide[c] &= kMask;
      uint8_t codes[kTile] = {};
      convert(wide, count, codes);
      typename Packing<F>::Lane lanes[kTile / kPerByte];
      std::memcpy(lanes, codes, sizeof codes);
      for (int64_t j = 0; j < (count + kPerByte - 1) / kPerByte; ++j)
        stored[first / kPerByte + j] = Packing<F>::pack(lanes[j]);
    }
  }
}

// `encode` for a format and a rounding that are known only when it runs.
TESSERA_INLINE void encode_as(Format format, bool nearest, const float* __restrict w, float scale, uint64_t key,
                              int64_t dim, uint8_t* __restrict stored) {
  switch (format) {
    case Format::kFp32: return encode<Format::kFp32, true>(w, 1, key, dim, stored);
    case Format::kFp16:
      return nearest ? encode<Format::kFp16, true>(w, 1, key, dim, stored)
                     : encode<Format::kFp16, false>(w, 1, key, dim, stored);
    case Format::kBf16:
      return nearest ? encode<Format::kBf16, true>(w, 1, key, dim, stored)
                     : encode<Format::kBf16, false>(w, 1, key, dim, stored);
    case Format::kInt8:
      return nearest ? encode<Format::kInt8, true>(w, scale, key, dim, stored)
                     : encode<Format::kInt8, false>(w, scale, key, dim, stored);
    case Format::kInt4:
      return nearest ? encode<Format::kInt4, true>(w, scale, key, dim, stored)
                     : encode<Format::kInt4, false>(w, scale, key, dim, stored);
    default:
      return nearest ? encode<Format::kInt2, true>(w, scale, key, dim, stored)
                     : encode<Format::kInt2, false>(w, scale, key, dim, stored);
  }
}

}  // namespace tessera
