// Sum the gradients of a batch by row.
#pragma once

#include <cstdint>
#include <cstring>

#include "chunks.h"
#include "multiversion.h"

namespace tessera {

struct Gradients {
  const float* grads;
  const int64_t* inverse;
  int64_t n;     // gradients
  int64_t rows;  // distinct rows, the range of inverse
  int64_t dim;
};

// Sum gradients into merged[inverse[i] - begin] for the rows [begin, end), in order of position. Every thread reads
// the whole inverse and takes its own rows from it: no locks, and the same order of summation for any number.
template <int64_t Dim>
TESSERA_INLINE Fault merge_rows(const Gradients& given, int64_t begin, int64_t end, float* merged) {
  const int64_t dim = Dim > 0 ? Dim : given.dim;
  int64_t fresh = begin;  // rows from here on have not been written: the usual order is that of first occurrence
  for (int64_t i = 0; i < given.n; ++i) {
    const int64_t row = given.inverse[i];
    if (__builtin_expect(static_cast<uint64_t>(row) >= static_cast<uint64_t>(given.rows), 0))
      return {"inverse", row, given.rows};
    if (row < begin || row >= end) continue;
    float* __restrict const sum = merged + (row - begin) * dim;
    const float* __restrict const grad = given.grads + i * dim;
    if (row < fresh) {
      for (int64_t c = 0; c < dim; ++c) sum[c] += grad[c];
      continue;
    }
    if (row > fresh) std::memset(merged + (fresh - begin) * dim, 0, (row - fresh) * dim * sizeof(float));
    for (int64_t c = 0; c < dim; ++c) sum[c] = grad[c];
    fresh = row + 1;
  }
  std::memset(merged + (fresh - begin) * dim, 0, (end - fresh) * dim * sizeof(float));
  return {};
}

TESSERA_SIMD static Fault merge(const Gradients& given, int64_t begin, int64_t end, float* merged) {
  switch (given.dim) {
    case 8: return merge_rows<8>(given, begin, end, merged);
    case 16: return merge_rows<16>(given, begin, end, merged);
    case 32: return merge_rows<32>(given, begin, end, merged);
    default: return merge_rows<0>(given, begin, end, merged);
  }
}

}  // namespace tessera
