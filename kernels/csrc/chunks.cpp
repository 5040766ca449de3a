// The error for a row that does not exist, kept out of the loops that find it.
#include "chunks.h"

namespace tessera {

void out_of_range(const char* name, int64_t found, int64_t end) {
  TORCH_CHECK_INDEX(false, name, ": expected below ", end, ", found ", found);
  __builtin_unreachable();
}

}  // namespace tessera
