// Second part of the backward: dW_gate, dW_up, dW_down from packed dg, du, h.
#include <ATen/ops/empty_like.h>

#include "layer.h"

namespace megasparse {

std::tuple<at::Tensor, at::Tensor> mlp_weight_gradients(const at::Tensor& dy, const at::Tensor& x,
                                                        const at::Tensor& w_in, const at::Tensor& w_down,
                                                        const OptionalTensor& order, int64_t sequences,
                                                        const std::vector<at::Tensor>& pattern,
                                                        const std::vector<at::Tensor>& values,
                                                        const OptionalTensor& main_w_in,
                                                        const OptionalTensor& main_w_down, int64_t stream) {
  const Layer layer(x, w_in, w_down, std::nullopt, order, sequences, stream);
  TORCH_CHECK(pattern.size() == 3 && values.size() == (layer.gated ? 3 : 2),
              "megasparse: the packed values are not this layer's");
  TORCH_CHECK(dy.scalar_type() == at::kBFloat16 && dy.is_contiguous() && dy.sizes() == x.sizes(),
              "megasparse: dy must be a contiguous bf16 tensor like x");
  TORCH_CHECK(main_w_in.has_value() == main_w_down.has_value(), "megasparse: give both main gradients or none");
  const bool accumulate = main_w_in.has_value();
  for (const OptionalTensor* main : {&main_w_in, &main_w_down}) {
    TORCH_CHECK(reinterpret_cast<uintptr_t>(data_or_null<float>(*main)) % 8 == 0,
                "megasparse: main gradients must begin at a multiple of 8 bytes: the kernels add pairs");
  }
  at::Tensor dw_in = accumulate ? layer.empty({0}, at::kBFloat16) : at::empty_like(w_in);
  at::Tensor dw_down = accumulate ? layer.empty({0}, at::kBFloat16) : at::empty_like(w_down);
  WgradParams wgrad{};
  wgrad.mask = data<int64_t>(pattern[0]);
  wgrad.offset = data<int16_t>(pattern[1]);
  wgrad.row_ptr = data<int64_t>(pattern[2]);
  wgrad.h = values[0].data_ptr();
  wgrad.du = values[1].data_ptr();
  wgrad.dg = layer.gated ? values[2].data_ptr() : nullptr;
  wgrad.x = x.data_ptr();
  wgrad.dy = dy.data_ptr();
  wgrad.order = layer.order;
  wgrad.dw_in = accumulate ? main_w_in->data_ptr() : dw_in.data_ptr();
  wgrad.dw_down = accumulate ? main_w_down->data_ptr() : dw_down.data_ptr();
  wgrad.output = accumulate ? WgradOutput::kFp32Accumulate : WgradOutput::kBf16;
  wgrad.gated = layer.gated;
  wgrad.m = layer.m;
  wgrad.sequences = layer.sequences;
  wgrad.h_size = layer.h;
  wgrad.d = layer.d;
  wgrad.sm_count = layer.sm_count;
  const at::Tensor workspace = layer.empty({static_cast<int64_t>(wgrad_workspace_bytes(wgrad))}, at::kByte);
  check(launch_wgrad(wgrad, workspace.data_ptr(), layer.stream), "the weight gradients");
  return {dw_in, dw_down};
}

}  // namespace megasparse
