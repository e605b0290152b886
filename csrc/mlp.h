// The sparse MLP on one device: forward and backward as sequences of kernel launches. Shapes and formats: README.md.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>

namespace megasparse {

using OptionalTensor = std::optional<at::Tensor>;

// As megasparse::mlp_sparse_forward (megasparse/mlp/sparse.py) on CUDA tensors of the current device, but token_mask goes by
// token, sequence after sequence (token_rows.h). `stream` is a cudaStream_t: the caller's current stream.
std::vector<at::Tensor> mlp_forward(const at::Tensor& x, const at::Tensor& w_in, const at::Tensor& w_down,
                                    const OptionalTensor& token_mask, const OptionalTensor& order, int64_t sequences,
                                    bool save, int64_t capacity, int64_t stream);

// The backward, as megasparse::mlp_sparse_{input_gradient, input_gradient_again, weight_gradients}; token_mask as above.
// Without `x` the first leaves its outputs undefined where the saved values are too few; the second then makes them,
// and does nothing where they are not.
std::vector<at::Tensor> mlp_input_gradient(const at::Tensor& dy, const OptionalTensor& dl1, const OptionalTensor& x,
                                           const at::Tensor& w_in, const at::Tensor& w_down,
                                           const OptionalTensor& token_mask, const OptionalTensor& order,
                                           int64_t sequences, const std::vector<at::Tensor>& saved, int64_t stream);
void mlp_input_gradient_again(const at::Tensor& dy, const OptionalTensor& dl1, const at::Tensor& x,
                              const at::Tensor& w_in, const at::Tensor& w_down, const OptionalTensor& token_mask,
                              const OptionalTensor& order, int64_t sequences, const std::vector<at::Tensor>& saved,
                              const at::Tensor& dx, const at::Tensor& h, const at::Tensor& du, const OptionalTensor& dg,
                              int64_t stream);
std::tuple<at::Tensor, at::Tensor> mlp_weight_gradients(const at::Tensor& dy, const at::Tensor& x,
                                                        const at::Tensor& w_in, const at::Tensor& w_down,
                                                        const OptionalTensor& order, int64_t sequences,
                                                        const std::vector<at::Tensor>& pattern,
                                                        const std::vector<at::Tensor>& values,
                                                        const OptionalTensor& main_w_in,
                                                        const OptionalTensor& main_w_down, int64_t stream);

}  // namespace megasparse
