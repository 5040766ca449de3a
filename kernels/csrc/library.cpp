// Schemas of all compiled ops. The implementations register themselves for CPU in their own files; shapes for
// tracing (fake kernels) are registered in Python beside the public functions.
#include <torch/library.h>

TORCH_LIBRARY(tessera, m) {
  m.def("xxh64(Tensor data, Tensor offsets) -> Tensor");
  m.def("hex_to_int64(Tensor data, Tensor offsets) -> (Tensor, Tensor)");
  m.def("mix64(Tensor x) -> Tensor");
  m.def("unmix64(Tensor x) -> Tensor");
  m.def("uniform(int stream, Tensor ids, int dim) -> Tensor");
  m.def("normal(int stream, Tensor ids, int dim) -> Tensor");
}
