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
TESSERA_INLINE float round_to_integer(float x, float lot) {
  if constexpr (Nearest) return std::nearbyint(x);
  const float below = std::floor(x);
  return below + (lot < x - below ? 1.0f : 0.0f);
}

template <Format F>
TESSERA_INLINE int32_t to_code(float rounded) {
  constexpr float kHigh = static_cast<float>((1 << (bits_of(F) - 1)) - 1), kLow = -kHigh - 1;
  return static_cast<int32_t>(std::min(kHigh, std::max(kLow, rounded)));
}

// The multiple of its format's spacing that a float becomes.
template <Format F, bool Nearest>
TESSERA_INLINE float to_grid(float x, float lot) {
  constexpr bool kHalf = F == Format::kFp16;
  constexpr uint32_t kMantissa = (kHalf ? 10u : 7u) << 23, kLowest = (kHalf ? 113u : 14u) << 23;
  const float most = kHalf ? 65504.0f : from_bits(0x7F7F0000u);
  const uint32_t spacing = std::max(to_bits(x) & 0x7F800000u, kLowest) - kMantissa;
  const float inverse = from_bits((254u << 23) - spacing);
  const float rounded = round_to_integer<Nearest>(x * inverse, lot) * from_bits(spacing);
  return std::min(most, std::max(-most, rounded));
}

// fp16 of a float that fp16 holds exactly, and back; by integer arithmetic, which vectorises everywhere.
TESSERA_INLINE uint16_t to_half(float x) {
  const uint32_t bits = to_bits(x), size = bits & 0x7FFFFFFFu;
  const auto small = static_cast<uint32_t>(static_cast<int32_t>(from_bits(size) * 0x1p24f));
  const uint32_t normal = (size - (112u << 23)) >> 13;
  return static_cast<uint16_t>((bits >> 16 & 0x8000u) | (size < (113u << 23) ? small : normal));
}

TESSERA_INLINE float from_half(uint16_t half) {
  const uint32_t size = half & 0x7FFFu;
  const float small = static_cast<float>(static_cast<int32_t>(size)) * 0x1p-24f;
  const uint32_t normal = (size << 13) + (112u << 23);
  return from_bits((size < 0x400u ? to_bits(small) : normal) | static_cast<uint32_t>(half & 0x8000u) << 16);
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

constexpr int64_t kTile = 64;  // codes between packing and arithmetic

// Values of a row from its storage. dim is a constant wherever the caller knows one.
template <Format F>
TESSERA_INLINE void decode(const uint8_t* __restrict stored, float step, int64_t dim, float* __restrict out) {
  if constexpr (F == Format::kFp32) {
    std::memcpy(out, stored, dim * 4);
  } else if constexpr (F == Format::kFp16 || F == Format::kBf16) {
    const auto* __restrict const halves = reinterpret_cast<const uint16_t*>(stored);
    for (int64_t c = 0; c < dim; ++c)
      out[c] = F == Format::kFp16 ? from_half(halves[c]) : from_bits(static_cast<uint32_t>(halves[c]) << 16);
  } else if constexpr (F == Format::kInt8) {
    for (int64_t c = 0; c < dim; ++c) out[c] = step * static_cast<float>(static_cast<int8_t>(stored[c]));
  } else {
    constexpr int kPerByte = Packing<F>::kPerByte, kHalf = 1 << (bits_of(F) - 1);
    typename Packing<F>::Lane lanes[kTile / kPerByte];
    for (int64_t first = 0; first < dim; first += kTile) {
      const int64_t count = std::min(kTile, dim - first);
      for (int64_t j = 0; j < (count + kPerByte - 1) / kPerByte; ++j)
        lanes[j] = Packing<F>::unpack(stored[first / kPerByte + j]);
      uint8_t codes[kTile];
      std::memcpy(codes, lanes, sizeof codes);
      for (int64_t c = 0; c < count; ++c) out[first + c] = step * static_cast<float>((codes[c] ^ kHalf) - kHalf);
    }
  }
}

// A row's values into storage. key (random_row of the row) and the column, counted from `first_lot`, draw the lots.
template <Format F, bool Nearest>
TESSERA_INLINE void encode(const float* __restrict w, float step, uint64_t key, int64_t dim, uint8_t* __restrict stored,
                           int64_t first_lot = 0) {
  if constexpr (F == Format::kFp32) {
    std::memcpy(stored, w, dim * 4);
  } else if constexpr (F == Format::kFp16 || F == Format::kBf16) {
    auto* __restrict const halves = reinterpret_cast<uint16_t*>(stored);
    for (int64_t c = 0; c < dim; ++c) {
      const float x = to_grid<F, Nearest>(w[c], Nearest ? 0.0f : lot_of(key, first_lot + c));
      halves[c] = F == Format::kFp16 ? to_half(x) : static_cast<uint16_t>(to_bits(x) >> 16);
    }
  } else if constexpr (F == Format::kInt8) {
    for (int64_t c = 0; c < dim; ++c) {
      const float lot = Nearest ? 0.0f : lot_of(key, first_lot + c);
      stored[c] = static_cast<uint8_t>(to_code<F>(round_to_integer<Nearest>(w[c] / step, lot)));
    }
  } else {
    constexpr int kPerByte = Packing<F>::kPerByte, kMask = (1 << bits_of(F)) - 1;
    for (int64_t first = 0; first < dim; first += kTile) {
      const int64_t count = std::min(kTile, dim - first);
      uint8_t codes[kTile] = {};
      for (int64_t c = 0; c < count; ++c) {
        const float lot = Nearest ? 0.0f : lot_of(key, first_lot + first + c);
        codes[c] = static_cast<uint8_t>(to_code<F>(round_to_integer<Nearest>(w[first + c] / step, lot)) & kMask);
      }
      typename Packing<F>::Lane lanes[kTile / kPerByte];
      std::memcpy(lanes, codes, sizeof codes);
      for (int64_t j = 0; j < (count + kPerByte - 1) / kPerByte; ++j)
        stored[first / kPerByte + j] = Packing<F>::pack(lanes[j]);
    }
  }
}

}  // namespace tessera
