// Where things are in a row: kernels/layout.py makes the numbers and says what they are.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "optimizers.h"
#include "quantise.h"

namespace tessera {

struct Layout {
  Format format;
  Kind optimizer;
  int64_t dim;
  bool learned, nearest;
  int64_t scale_state, state_floats, moments;
  int64_t state_at, moments_at, values_at;  // byte offsets; the scale is at 0, its state at 4
  int64_t bytes;

  explicit Layout(at::IntArrayRef numbers) {
    TORCH_CHECK_VALUE(numbers.size() == 12, "layout: expected 12 numbers, found ", numbers.size());
    format = format_of(numbers[0]), optimizer = kind_of(numbers[1]), dim = numbers[2];
    learned = numbers[3] != 0, nearest = numbers[4] != 0;
    scale_state = numbers[5], state_floats = numbers[6], moments = numbers[7];
    state_at = numbers[8], moments_at = numbers[9], values_at = numbers[10], bytes = numbers[11];
    TORCH_CHECK_VALUE(dim >= 1 && scale_state >= 0 && scale_state <= 3 && state_floats >= 0 && moments >= 0 &&
                          state_at >= 4 * (is_int(format) + scale_state) && moments_at >= state_at + 4 * state_floats &&
                          moments_at + 2 * moments <= bytes && values_at >= 0 &&
                          values_at + stored_bytes(format, dim) <= bytes,
                      "layout: ", bytes, " bytes do not hold a row of ", dim, " values");
  }

  // 1 where values have no scale.
  TESSERA_INLINE float scale_of(const char* row) const {
    return is_int(format) ? *reinterpret_cast<const float*>(row) : 1.0f;
  }
  TESSERA_INLINE float* state_of(char* row) const { return reinterpret_cast<float*>(row + state_at); }
  TESSERA_INLINE uint8_t* values_of(char* row) const { return reinterpret_cast<uint8_t*>(row + values_at); }
};

}  // namespace tessera
