// CRC-32 as zlib and PNG have it: polynomial 0x04C11DB7, bits reversed.
//
// A message is a polynomial over two elements, its CRC the remainder by the CRC's polynomial. What stands n bits before
// the end of what is read so far can be replaced by its product with x^n mod P, which is shorter: 64 bytes are folded
// onto the 64 that follow by carry-less multiplications (V. Gopal et al., "Fast CRC Computation for Generic Polynomials
// Using PCLMULQDQ Instruction", Intel 2009). The last 64 bytes and what is left go through tables.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <array>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define TESSERA_CLMUL 1
#endif

namespace {

constexpr uint32_t kPolynomial = 0xEDB88320;  // without x^32; the highest bit stands for x^0

constexpr uint32_t times_x(uint32_t p) { return (p >> 1) ^ (p & 1 ? kPolynomial : 0); }

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b]: what byte b leaves behind when k zero bytes follow it.
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t left = b;
    for (int i = 0; i < 8; ++i) left = times_x(left);
    tables[0][b] = left;
  }
  for (int k = 1; k < 8; ++k)
    for (uint32_t b = 0; b < 256; ++b) {
      const uint32_t left = tables[k - 1][b];
      tables[k][b] = (left >> 8) ^ tables[0][left & 255];
    }
  return tables;
}

constexpr Tables kTables = make_tables();

uint32_t by_table(uint32_t state, const uint8_t* data, int64_t n) {
  for (; n >= 8; data += 8, n -= 8) {
    uint32_t low = state;
    for (int i = 0; i < 4; ++i) low ^= static_cast<uint32_t>(data[i]) << (8 * i);
    state = kTables[7][low & 255] ^ kTables[6][(low >> 8) & 255] ^ kTables[5][(low >> 16) & 255] ^ kTables[4][low >> 24];
    state ^= kTables[3][data[4]] ^ kTables[2][data[5]] ^ kTables[1][data[6]] ^ kTables[0][data[7]];
  }
  for (; n > 0; ++data, --n) state = (state >> 8) ^ kTables[0][(state ^ *data) & 255];
  return state;
}

#ifdef TESSERA_CLMUL
// x^n mod P as a factor: one bit further, for a product of two numbers with reversed bits lies one bit off.
constexpr int64_t power_of_x(int n) {
  uint32_t p = 0x80000000;
  for (int i = 0; i < n; ++i) p = times_x(p);
  return static_cast<int64_t>(p) << 1;
}

constexpr int64_t kFold = 64;  // bytes
constexpr int kFoldBits = 8 * kFold;

__attribute__((target("pclmul,sse2"))) uint32_t by_folding(uint32_t state, const uint8_t* data, int64_t n) {
  const __m128i* in = reinterpret_cast<const __m128i*>(data);
  const __m128i factors = _mm_set_epi64x(power_of_x(kFoldBits - 32), power_of_x(kFoldBits + 32));
  __m128i lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = _mm_loadu_si128(in + i);
  lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(static_cast<int>(state)));
  for (in += 4, n -= kFold; n >= kFold; in += 4, n -= kFold) {
    for (int i = 0; i < 4; ++i) {
      const __m128i first = _mm_clmulepi64_si128(lanes[i], factors, 0x00);
      const __m128i second = _mm_clmulepi64_si128(lanes[i], factors, 0x11);
      lanes[i] = _mm_xor_si128(_mm_xor_si128(first, second), _mm_loadu_si128(in + i));
    }
  }
  uint8_t folded[kFold];
  std::memcpy(folded, lanes, kFold);
  return by_table(by_table(0, folded, kFold), reinterpret_cast<const uint8_t*>(in), n);
}
#endif

int64_t crc32(const at::Tensor& data, int64_t before) {
  TORCH_CHECK_VALUE(data.dim() == 1 && data.dtype() == at::kByte && data.is_contiguous(),
                    "data: expected contiguous uint8 [n], found ", data.dtype(), " ", data.sizes());
  const uint8_t* const bytes = data.const_data_ptr<uint8_t>();
  const uint32_t state = ~static_cast<uint32_t>(before);
#ifdef TESSERA_CLMUL
  if (data.numel() >= kFold && __builtin_cpu_supports("pclmul")) return uint32_t{~by_folding(state, bytes, data.numel())};
#endif
  return uint32_t{~by_table(state, bytes, data.numel())};
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) { m.impl("crc32", &crc32); }
