// Memory for tables in large pages, where the system has them.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// Only whole large pages: the rest of the last one may belong to somebody else.
void advise_large_pages(const at::Tensor& memory, int64_t page) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto begin = reinterpret_cast<uintptr_t>(memory.data_ptr());
  const uintptr_t bytes = memory.nbytes() / page * page;
  if (begin % page == 0 && bytes > 0) madvise(memory.data_ptr(), bytes, MADV_HUGEPAGE);  // advice: may be refused
#endif
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) { m.impl("advise_large_pages", &advise_large_pages); }
