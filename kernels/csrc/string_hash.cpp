// XXH64 (seed 0) and hexadecimal parsing of string columns, on the calling thread.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <tuple>

namespace {

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87ULL;
constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4FULL;
constexpr uint64_t kPrime3 = 0x165667B19E3779F9ULL;
constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63ULL;
constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5ULL;

inline uint64_t rotate_left(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

template <typename Word>
inline uint64_t load(const uint8_t* at) {
  Word word;
  std::memcpy(&word, at, sizeof(word));
  return word;
}

inline uint64_t round_of(uint64_t lane, uint64_t word) { return rotate_left(lane + word * kPrime2, 31) * kPrime1; }

inline uint64_t absorb(uint64_t acc, uint64_t lane) { return (acc ^ round_of(0, lane)) * kPrime1 + kPrime4; }

inline uint64_t hash_stripes(const uint8_t*& at, const uint8_t* end) {
  uint64_t a = kPrime1 + kPrime2, b = kPrime2, c = 0, d = 0 - kPrime1;
  for (; end - at >= 32; at += 32) {
    a = round_of(a, load<uint64_t>(at));
    b = round_of(b, load<uint64_t>(at + 8));
    c = round_of(c, load<uint64_t>(at + 16));
    d = round_of(d, load<uint64_t>(at + 24));
  }
  const uint64_t acc = rotate_left(a, 1) + rotate_left(b, 7) + rotate_left(c, 12) + rotate_left(d, 18);
  return absorb(absorb(absorb(absorb(acc, a), b), c), d);
}

inline uint64_t hash_one(const uint8_t* at, int64_t length) {
  const uint8_t* const end = at + length;
  uint64_t acc = length >= 32 ? hash_stripes(at, end) : kPrime5;
  acc += static_cast<uint64_t>(length);
  for (; end - at >= 8; at += 8)
    acc = rotate_left(acc ^ round_of(0, load<uint64_t>(at)), 27) * kPrime1 + kPrime4;
  if (end - at >= 4) {
    acc = rotate_left(acc ^ (load<uint32_t>(at) * kPrime1), 23) * kPrime2 + kPrime3;
    at += 4;
  }
  for (; at < end; ++at) acc = rotate_left(acc ^ (*at * kPrime5), 11) * kPrime1;
  acc = (acc ^ (acc >> 33)) * kPrime2;
  acc = (acc ^ (acc >> 29)) * kPrime3;
  return acc ^ (acc >> 32);
}

// A column of strings whose offsets have been checked: no string leaves the buffer.
struct Strings {
  at::Tensor data, offsets;
  const uint8_t* bytes;
  const int64_t* at;
  int64_t rows;

  Strings(const at::Tensor& data_, const at::Tensor& offsets_)
      : data(data_.contiguous()), offsets(offsets_.contiguous()) {
    TORCH_CHECK_VALUE(data.dim() == 1 && offsets.dim() == 1 && offsets.numel() > 0,
                      "expected data uint8 [bytes] and offsets int64 [n + 1]");
    bytes = data.const_data_ptr<uint8_t>();
    at = offsets.const_data_ptr<int64_t>();
    rows = offsets.numel() - 1;
    bool good = at[0] >= 0 && at[rows] <= data.numel();
    for (int64_t i = 0; i < rows; ++i) good &= at[i] <= at[i + 1];
    TORCH_CHECK_VALUE(good, "offsets must not decrease and must stay inside the ", data.numel(), " bytes of data");
  }
};

at::Tensor xxh64(const at::Tensor& data, const at::Tensor& offsets) {
  const Strings strings(data, offsets);
  at::Tensor ids = at::empty({strings.rows}, strings.offsets.options());
  int64_t* out = ids.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < strings.rows; ++i)
    out[i] = static_cast<int64_t>(hash_one(strings.bytes + strings.at[i], strings.at[i + 1] - strings.at[i]));
  return ids;
}

constexpr uint8_t kNoDigit = 0x80;

constexpr std::array<uint8_t, 256> hex_digits() {
  std::array<uint8_t, 256> digit{};
  for (int c = 0; c < 256; ++c) digit[c] = kNoDigit;
  for (int v = 0; v < 10; ++v) digit['0' + v] = v;
  for (int v = 10; v < 16; ++v) digit['a' + v - 10] = digit['A' + v - 10] = v;
  return digit;
}

constexpr std::array<uint8_t, 256> kDigit = hex_digits();

std::tuple<at::Tensor, at::Tensor> hex_to_int64(const at::Tensor& data, const at::Tensor& offsets) {
  const Strings strings(data, offsets);
  at::Tensor ids = at::empty({strings.rows}, strings.offsets.options());
  at::Tensor ok = at::empty({strings.rows}, strings.offsets.options().dtype(at::kBool));
  int64_t* out = ids.mutable_data_ptr<int64_t>();
  bool* good = ok.mutable_data_ptr<bool>();
  for (int64_t i = 0; i < strings.rows; ++i) {
    const uint8_t* const begin = strings.bytes + strings.at[i];
    const int64_t length = strings.at[i + 1] - strings.at[i];
    uint64_t number = 0;
    uint8_t seen = length >= 1 && length <= 16 ? 0 : kNoDigit;
    for (int64_t j = 0; j < length && seen < kNoDigit; ++j) {
      const uint8_t digit = kDigit[begin[j]];
      seen |= digit;
      number = (number << 4) | digit;
    }
    good[i] = seen < kNoDigit;
    out[i] = good[i] ? static_cast<int64_t>(number) : 0;
  }
  return {ids, ok};
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("xxh64", &xxh64);
  m.impl("hex_to_int64", &hex_to_int64);
}
