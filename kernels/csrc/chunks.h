// Rows stored in chunks as kernels/chunks.py describes, seen as raw memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "multiversion.h"

namespace tessera {

constexpr int64_t kAhead = 32;  // rows between the request for a cache line and its use
constexpr int64_t kMostAhead = 512;  // bytes of a row requested: the processor sees for itself where a long row goes on

// A number that is not in [0, end). TESSERA_SIMD functions return it instead of throwing: gcc takes calls of such
// functions for calls that never throw, and an exception would end the process.
struct Fault {
  const char* name = nullptr;
  int64_t found = 0;
  int64_t end = 0;

  // Raise IndexError if there is a fault.
  void raise() const { TORCH_CHECK_INDEX(name == nullptr, name, ": expected below ", end, ", found ", found); }
};

// T is the element type, or char to move rows of any type as bytes (width is then in bytes).
template <typename T>
struct Rows {
  std::vector<T*> chunks;
  int64_t shift = 0;
  int64_t mask = 0;
  int64_t width = 0;
  int64_t count = 0;

  explicit Rows(at::TensorList tensors, int64_t columns) {
    if (tensors.empty()) return;
    const at::Tensor& first = tensors[0];
    TORCH_CHECK_VALUE(first.dim() == 2 && first.size(0) > 0 && (first.size(0) & (first.size(0) - 1)) == 0 &&
                          first.size(1) >= columns,
                      "chunks: expected [a power of two, ", columns, " or more], found ", first.sizes());
    chunks.reserve(tensors.size());
    for (const at::Tensor& chunk : tensors) {
      TORCH_CHECK_VALUE(chunk.sizes() == first.sizes() && chunk.dtype() == first.dtype() && chunk.is_contiguous(),
                        "chunks: expected all contiguous and like the first, found ", chunk.sizes());
      if constexpr (std::is_same_v<T, char>)
        chunks.push_back(static_cast<char*>(chunk.data_ptr()));
      else
        chunks.push_back(chunk.data_ptr<T>());
    }
    while ((int64_t{1} << shift) < first.size(0)) ++shift;
    mask = first.size(0) - 1;
    width = first.size(1) * (std::is_same_v<T, char> ? first.element_size() : 1);
    count = static_cast<int64_t>(tensors.size()) << shift;
  }

  TESSERA_INLINE T* operator[](int64_t row) const { return chunks[row >> shift] + (row & mask) * width; }

  TESSERA_INLINE bool beyond(int64_t row) const { return __builtin_expect(row >= count, 0); }
  Fault fault(int64_t row) const { return {"rows", row, count}; }

  // Ask for the first `bytes` of a row that is needed soon, if there is such a row.
  TESSERA_INLINE void prefetch(int64_t row, int64_t bytes) const {
    if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(count)) return;
    const char* const at = reinterpret_cast<const char*>((*this)[row]);
    for (int64_t offset = 0; offset < std::min(bytes, kMostAhead); offset += 64) __builtin_prefetch(at + offset);
    __builtin_prefetch(at + bytes - 1);
  }
};

}  // namespace tessera
