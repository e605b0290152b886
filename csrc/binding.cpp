// Registers torch.ops.megasparse_kernels; megasparse/mlp/cuda.py calls it.
#include <torch/library.h>

#include "mlp.h"

namespace {

using at::Tensor;
using megasparse::OptionalTensor;

// The kernels copy 16 bytes at a time: a view that begins elsewhere is copied first.
Tensor aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 ? tensor : tensor.clone();
}

OptionalTensor aligned(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(aligned(*tensor)) : std::nullopt;
}

std::vector<Tensor> forward(const Tensor& x, const Tensor& w_in, const Tensor& w_down, const OptionalTensor& token_mask,
                            const OptionalTensor& order, int64_t sequences, bool save, int64_t capacity,
                            int64_t stream) {
  return megasparse::mlp_forward(aligned(x), aligned(w_in), aligned(w_down), token_mask, order, sequences, save,
                                 capacity, stream);
}

std::vector<Tensor> input_gradient(const Tensor& dy, const OptionalTensor& dl1, const OptionalTensor& x,
                                   const Tensor& w_in, const Tensor& w_down, const OptionalTensor& token_mask,
                                   const OptionalTensor& order, int64_t sequences, at::TensorList saved,
                                   int64_t stream) {
  return megasparse::mlp_input_gradient(aligned(dy), dl1, aligned(x), aligned(w_in), aligned(w_down), token_mask, order,
                                        sequences, saved.vec(), stream);
}

void input_gradient_again(const Tensor& dy, const OptionalTensor& dl1, const Tensor& x, const Tensor& w_in,
                          const Tensor& w_down, const OptionalTensor& token_mask, const OptionalTensor& order,
                          int64_t sequences, at::TensorList saved, const Tensor& dx, const Tensor& h, const Tensor& du,
                          const OptionalTensor& dg, int64_t stream) {
  megasparse::mlp_input_gradient_again(aligned(dy), dl1, aligned(x), aligned(w_in), aligned(w_down), token_mask, order,
                                       sequences, saved.vec(), dx, h, du, dg, stream);
}

std::tuple<Tensor, Tensor> weight_gradients(const Tensor& dy, const Tensor& x, const Tensor& w_in, const Tensor& w_down,
                                            const OptionalTensor& order, int64_t sequences, at::TensorList pattern,
                                            at::TensorList values, const OptionalTensor& main_w_in,
                                            const OptionalTensor& main_w_down, int64_t stream) {
  return megasparse::mlp_weight_gradients(aligned(dy), aligned(x), w_in, w_down, order, sequences, pattern.vec(),
                                          values.vec(), main_w_in, main_w_down, stream);
}

}  // namespace

TORCH_LIBRARY(megasparse_kernels, library) {
  library.def(
      "forward(Tensor x, Tensor w_in, Tensor w_down, Tensor? token_mask, Tensor? order, int sequences, "
      "bool save, int capacity, int stream) -> Tensor[]");
  library.def(
      "input_gradient(Tensor dy, Tensor? dl1, Tensor? x, Tensor w_in, Tensor w_down, Tensor? token_mask, "
      "Tensor? order, int sequences, Tensor[] saved, int stream) -> Tensor[]");
  library.def(
      "input_gradient_again(Tensor dy, Tensor? dl1, Tensor x, Tensor w_in, Tensor w_down, Tensor? token_mask, "
      "Tensor? order, int sequences, Tensor[] saved, Tensor(a!) dx, Tensor(b!) h, Tensor(c!) du, Tensor(d!)? dg, "
      "int stream) -> ()");
  library.def(
      "weight_gradients(Tensor dy, Tensor x, Tensor w_in, Tensor w_down, Tensor? order, int sequences, "
      "Tensor[] pattern, Tensor[] values, Tensor(a!)? main_w_in, Tensor(b!)? main_w_down, int stream) "
      "-> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(megasparse_kernels, CUDA, library) {
  library.impl("forward", forward);
  library.impl("input_gradient", input_gradient);
  library.impl("input_gradient_again", input_gradient_again);
  library.impl("weight_gradients", weight_gradients);
}
