// The rows of a batch, position by position.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "chunks.h"
#include "multiversion.h"

namespace tessera {

// Position i reads rows[inverse[i]], or rows[i] without an inverse.
struct Positions {
  const int64_t* rows;
  const int64_t* inverse;  // null: none
  int64_t count;           // of rows

  TESSERA_INLINE bool wrong(int64_t i) const {
    return inverse != nullptr &&
           __builtin_expect(static_cast<uint64_t>(inverse[i]) >= static_cast<uint64_t>(count), 0);
  }
  TESSERA_INLINE int64_t operator[](int64_t i) const { return rows[inverse == nullptr ? i : inverse[i]]; }
  // The row of a position that will be needed soon; -1 where there is none.
  TESSERA_INLINE int64_t peek(int64_t i) const { return wrong(i) ? -1 : (*this)[i]; }
  Fault fault(int64_t i) const { return {"inverse", inverse[i], count}; }
};

inline Positions positions_of(const at::Tensor& rows, const at::Tensor& inverse) {
  const int64_t* const at = inverse.defined() ? inverse.const_data_ptr<int64_t>() : nullptr;
  return {rows.const_data_ptr<int64_t>(), at, rows.numel()};
}

}  // namespace tessera
