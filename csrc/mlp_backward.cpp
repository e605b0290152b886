// Backward: packed g, u -> compact blocks -> dh, dg, du over unions -> dx over unions; weight gradients.
//
// Where the forward saved fewer values than there are (`overflow`), g and u are computed again. Which of the two
// happens is only known on the device, so both are launched and one of them exits at once.
#include <ATen/ops/empty_like.h>

#include "layer.h"

namespace megasparse {
namespace {

struct Compact {
  at::Tensor g, u, base;
};

Compact restore_compact(const Layer& layer, const PatternTensors& pattern, const at::Tensor& plan,
                        const std::vector<at::Tensor>& packed, const at::Tensor& slots) {
  Compact compact{layer.worst_case(), layer.gated ? layer.worst_case() : at::Tensor(),
                  layer.empty({layer.tiles * layer.words, 128}, at::kShort)};
  const at::Tensor flags = layer.empty({2}, at::kInt);
  const int32_t* overflow = data<int32_t>(flags);
  const int32_t* fits = overflow + 1;
  check(launch_overflow_flags(data<int64_t>(pattern.row_ptr) + layer.padded_tokens(), packed[0].numel(),
                              data<int32_t>(flags), layer.stream),
        "comparing with the saved capacity");

  ExpandParams expand = expand_params(layer, pattern, compact.base);
  expand.run_if = fits;
  expand.packed[0] = packed[0].data_ptr();
  expand.compact[0] = compact.g.data_ptr();
  if (layer.gated) {
    expand.packed[1] = packed[1].data_ptr();
    expand.compact[1] = compact.u.data_ptr();
  }
  check(launch_expand(expand, layer.stream), "expanding the saved activations");

  const at::Tensor mask_again = at::empty_like(pattern.mask);
  run_gate(layer, data<uint64_t>(mask_again), slots.data_ptr(), overflow);
  ExpandParams again = expand_params(layer, pattern, compact.base);
  again.run_if = overflow;
  again.slots = slots.data_ptr();
  again.compact[0] = compact.g.data_ptr();
  check(launch_expand(again, layer.stream), "expanding the gate again");
  if (layer.gated) {
    GatherNtParams up = gather_nt_params(layer, pattern, plan, compact.base, GatherNtMode::kUpOnly);
    up.run_if = overflow;
    up.a = layer.x.data_ptr();
    up.weight = layer.w_up();
    up.g_compact = compact.g.data_ptr();
    up.u_compact = compact.u.data_ptr();
    check(launch_gather_nt(up, layer.stream), "the gathered up product again");
  }
  return compact;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> mlp_backward(
    const at::Tensor& dy, const OptionalTensor& dl1, const at::Tensor& x, const at::Tensor& w_in,
    const at::Tensor& w_down, const OptionalTensor& token_mask, const OptionalTensor& order, int64_t sequences,
    const std::vector<at::Tensor>& saved, const OptionalTensor& main_w_in, const OptionalTensor& main_w_down,
    int64_t stream) {
  const Layer layer(x, w_in, w_down, token_mask, order, sequences, stream);
  TORCH_CHECK(saved.size() == (layer.gated ? 8 : 7), "megasparse: the saved tensors are not this layer's");
  TORCH_CHECK(dy.scalar_type() == at::kBFloat16 && dy.is_contiguous() && dy.sizes() == x.sizes(),
              "megasparse: dy must be a contiguous bf16 tensor like x");
  TORCH_CHECK(!dl1.has_value() || (dl1->scalar_type() == at::kFloat && dl1->numel() == 1),
              "megasparse: dl1 must be an fp32 scalar");
  TORCH_CHECK(main_w_in.has_value() == main_w_down.has_value(), "megasparse: give both main gradients or none");
  const PatternTensors pattern{saved[0], saved[1], saved[2], saved[3], saved[4], saved[5]};
  const std::vector<at::Tensor> packed(saved.begin() + 6, saved.end());

  const at::Tensor du = layer.worst_case();
  const at::Tensor h = layer.worst_case();
  const at::Tensor dg = layer.gated ? layer.worst_case() : at::Tensor();
  at::Tensor plan = run_plan(layer, pattern);
  // The slots of a repeated gate product lie where `dh` writes its packed values afterwards.
  Compact compact = restore_compact(layer, pattern, plan, packed, h);

  GatherNtParams dh = gather_nt_params(layer, pattern, plan, compact.base,
                                       layer.gated ? GatherNtMode::kDh : GatherNtMode::kDhPlain);
  dh.a = dy.data_ptr();
  dh.weight = w_down.data_ptr();
  dh.g_compact = compact.g.data_ptr();
  dh.u_compact = layer.gated ? compact.u.data_ptr() : nullptr;
  dh.dg_packed = layer.gated ? dg.data_ptr() : nullptr;
  dh.du_packed = du.data_ptr();
  dh.h_packed = h.data_ptr();
  dh.capacity = du.numel();
  dh.l1_grad = data_or_null<float>(dl1);
  check(launch_gather_nt(dh, layer.stream), "the gathered product of dh");

  at::Tensor dx = at::empty_like(x);
  if (layer.gated) {
    run_gather_down(layer, pattern, compact.g.data_ptr(), w_in.data_ptr(), compact.u.data_ptr(), layer.w_up(), dx);
  } else {
    run_gather_down(layer, pattern, compact.g.data_ptr(), w_in.data_ptr(), nullptr, nullptr, dx);
  }

  compact = Compact();  // the weight gradients' scratch may lie there
  plan.reset();

  const bool accumulate = main_w_in.has_value();
  at::Tensor dw_in = accumulate ? layer.empty({0}, at::kBFloat16) : at::empty_like(w_in);
  at::Tensor dw_down = accumulate ? layer.empty({0}, at::kBFloat16) : at::empty_like(w_down);
  WgradParams wgrad{};
  wgrad.mask = data<int64_t>(pattern.mask);
  wgrad.offset = data<int16_t>(pattern.offset);
  wgrad.row_ptr = data<int64_t>(pattern.row_ptr);
  wgrad.dg = layer.gated ? dg.data_ptr() : nullptr;
  wgrad.du = du.data_ptr();
  wgrad.h = h.data_ptr();
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
  return {dx, dw_in, dw_down};
}

}  // namespace megasparse
