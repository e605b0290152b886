// Registers torch.ops.megasparse_kernels; megasparse/mlp/cuda.py calls it.
#include <torch/library.h>

#include "mlp.h"

TORCH_LIBRARY(megasparse_kernels, library) {
  library.def(
      "forward(Tensor x, Tensor w_in, Tensor w_down, Tensor? token_mask, Tensor? order, int sequences, "
      "bool save, int capacity, int stream) -> Tensor[]");
  library.def(
      "backward(Tensor dy, Tensor? dl1, Tensor x, Tensor w_in, Tensor w_down, Tensor? token_mask, Tensor? order, "
      "int sequences, Tensor[] saved, Tensor(a!)? main_w_in, Tensor(b!)? main_w_down, int stream) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(megasparse_kernels, CUDA, library) {
  library.impl("forward", megasparse::mlp_forward);
  library.impl("backward", [](const at::Tensor& dy, const std::optional<at::Tensor>& dl1, const at::Tensor& x,
                              const at::Tensor& w_in, const at::Tensor& w_down,
                              const std::optional<at::Tensor>& token_mask, const std::optional<at::Tensor>& order,
                              int64_t sequences, at::TensorList saved, const std::optional<at::Tensor>& main_w_in,
                              const std::optional<at::Tensor>& main_w_down, int64_t stream) {
    return megasparse::mlp_backward(dy, dl1, x, w_in, w_down, token_mask, order, sequences, saved.vec(), main_w_in,
                                    main_w_down, stream);
  });
}
