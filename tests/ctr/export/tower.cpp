// Run an exported tower by AOTInductor from C++: tower PACKAGE INPUTS OUTPUT, where INPUTS holds, for each tensor, its
// number of dimensions, their sizes (int64) and its values (float32), and OUTPUT takes the logits (float32).
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdint>
#include <fstream>
#include <iostream>
#include <vector>

namespace {

int64_t number(std::ifstream& file) {
  int64_t value = 0;
  file.read(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

std::vector<at::Tensor> tensors(const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<at::Tensor> found;
  for (int64_t dims = number(file); file; dims = number(file)) {
    std::vector<int64_t> sizes;
    for (int64_t dim = 0; dim < dims; ++dim) sizes.push_back(number(file));
    at::Tensor tensor = at::empty(sizes, at::kFloat);
    file.read(reinterpret_cast<char*>(tensor.data_ptr<float>()), tensor.nbytes());
    found.push_back(tensor);
  }
  return found;
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) {
    std::cerr << "usage: tower PACKAGE INPUTS OUTPUT\n";
    return 2;
  }
  c10::InferenceMode mode;
  torch::inductor::AOTIModelPackageLoader loader(words[1]);
  std::vector<at::Tensor> inputs = tensors(words[2]);
  at::Tensor logits = loader.run(inputs)[0].contiguous();
  std::ofstream output(words[3], std::ios::binary);
  output.write(reinterpret_cast<const char*>(logits.data_ptr<float>()), logits.nbytes());
  return output ? 0 : 1;
}
