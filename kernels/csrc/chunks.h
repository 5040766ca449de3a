// Rows stored in chunks as kernels/chunks.py describes, seen as raw memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "multiversion.h"

namespace tessera {

constexpr int64_t kAhead = 16;  // rows between the request for a cache line and its use

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

  // Ask for `lines` cache lines of a row that is needed soon; row -1 has none.
  TESSERA_INLINE void prefetch(int64_t row, int64_t lines) const {
    if (row < 0) return;
    const char* const at = reinterpret_cast<const char*>((*this)[row]);
    for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(at + 64 * line);
  }
};

// Raise IndexError unless all numbers are in [lowest, end).
void check_range(const char* name, const int64_t* numbers, int64_t n, int64_t lowest, int64_t end);

}  // namespace tessera
