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

  m.def("unique_inverse(Tensor ids) -> (Tensor, Tensor, Tensor)");
  m.def("id_map_find(Tensor directory, Tensor[] chunks, Tensor ids) -> Tensor");
  m.def(
      "id_map_insert(Tensor(a!) directory, Tensor(b!)[] chunks, Tensor(c!) segments, Tensor(d!) counters, Tensor ids, "
      "Tensor rows) -> ()");
  m.def(
      "id_map_erase(Tensor directory, Tensor(a!)[] chunks, Tensor(b!) segments, Tensor(c!) counters, Tensor ids) -> "
      "Tensor");

  m.def("gather(Tensor[] chunks, Tensor rows, int dim, Tensor? inverse, Tensor? default, int begin) -> Tensor");
  m.def("pool(Tensor values, Tensor index, Tensor offsets, Tensor? weights, int keys, int[] widths) -> Tensor[]");
  m.def("pool_backward(Tensor[] grads, Tensor index, Tensor offsets, Tensor? weights, int rows) -> Tensor");
  m.def("scatter(Tensor(a!)[] chunks, Tensor rows, Tensor values, int begin) -> ()");
  m.def("scatter_columns(Tensor(a!)[] chunks, Tensor rows, Tensor[] parts, int begin) -> ()");
  m.def("copy_rows(Tensor[] source, Tensor rows, Tensor(a!)[] target, Tensor places) -> ()");
  m.def(
      "init_rows(Tensor(a!)[] chunks, Tensor rows, Tensor ids, int dim, bool bell, float offset, float scale, "
      "int stream, float state) -> ()");
  m.def(
      "update(Tensor(a!)[] chunks, Tensor rows, Tensor grads, Tensor? inverse, str optimizer, float learning_rate, "
      "float weight_decay, float eps, float beta1, float beta2, float beta, float l1, float l2) -> ()");

  m.def("quantise(Tensor values, Tensor? steps, int format, bool nearest, Tensor ids, int stream) -> Tensor");
  m.def("dequantise(Tensor stored, Tensor? steps, int format, int dim) -> Tensor");
  m.def("packed_gather(Tensor[] chunks, Tensor rows, int[] layout, Tensor? inverse) -> Tensor");
  m.def(
      "packed_update(Tensor(a!)[] chunks, Tensor rows, Tensor grads, Tensor? inverse, Tensor ids, int[] layout, "
      "str optimizer, float[] hyper, int stream, bool nearest, Tensor(b!)? held) -> ()");
  m.def(
      "packed_look_ahead(Tensor[] chunks, Tensor rows, Tensor held, int[] layout, Tensor? inverse) -> Tensor");
  m.def(
      "packed_learn_steps(Tensor(a!)[] chunks, Tensor rows, Tensor held, Tensor grads, Tensor? inverse, Tensor ids, "
      "int[] layout, str optimizer, float gradient_scale, float[] hyper, int stream, bool nearest) -> ()");

  m.def("take_places(Tensor(a!) places, Tensor rows, int taken) -> Tensor");
  m.def("touch(Tensor(a!)[] chunks, Tensor rows, Tensor now, Tensor? counts) -> ()");
  m.def("expired(Tensor[] chunks, int limit, int begin, int end) -> Tensor");
  m.def("coldest(Tensor[] chunks, int column, int k, int begin, int end, Tensor? keep) -> Tensor");
}
