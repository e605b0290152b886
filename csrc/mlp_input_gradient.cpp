// First part of the backward: packed g, u -> compact blocks -> dh, dg, du over unions -> dx over unions.
//
// Where the forward saved fewer values than there are (`overflow`), g and u are computed again from x. Which of the two
// happens is only known on the device, so both are launched and one of them exits at once. Under sequence parallelism x
// may still be on its way: then everything up to dx is launched twice, first from the saved values, which reads no x,
// and, when x is there, from x.
#include <ATen/ops/empty_like.h>

#include "layer.h"

namespace megasparse {
namespace {

struct Compact {
  at::Tensor g, u, base;

  explicit Compact(const Layer& layer)
      : g(layer.worst_case()), u(layer.gated ? layer.worst_case() : at::Tensor()),
        base(layer.empty({layer.tiles * layer.words, 128}, at::kShort)) {}
};

// dx; packed h, du and (gated) dg, which the weight gradients need.
struct Outputs {
  at::Tensor dx, h, du, dg;
};

struct Upstream {
  const at::Tensor& dy;
  const OptionalTensor& dl1;
};

// Device flags: whether the saved values are too few, and whether they are not.
struct Overflow {
  at::Tensor flags;

  Overflow(const Layer& layer, const PatternTensors& pattern, const at::Tensor& packed)
      : flags(layer.empty({2}, at::kInt)) {
    check(launch_overflow_flags(data<int64_t>(pattern.row_ptr) + layer.padded_tokens(), packed.numel(),
                                data<int32_t>(flags), layer.stream),
          "comparing with the saved capacity");
  }
  const int32_t* happened() const { return data<int32_t>(flags); }
  const int32_t* did_not() const { return data<int32_t>(flags) + 1; }
};

PatternTensors pattern_of(const Layer& layer, const std::vector<at::Tensor>& saved) {
  TORCH_CHECK(saved.size() == (layer.gated ? 8 : 7), "megasparse: the saved tensors are not this layer's");
  return {saved[0], saved[1], saved[2], saved[3], saved[4], saved[5]};
}

void check_upstream(const Upstream& upstream) {
  TORCH_CHECK(!upstream.dl1.has_value() || (upstream.dl1->scalar_type() == at::kFloat && upstream.dl1->numel() == 1),
              "megasparse: dl1 must be an fp32 scalar");
}

void check_input(const at::Tensor& x, const at::Tensor& dy) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.is_contiguous() && x.sizes() == dy.sizes(),
              "megasparse: x must be a contiguous bf16 tensor like dy");
}

void expand_saved(const Layer& layer, const PatternTensors& pattern, const std::vector<at::Tensor>& saved,
                  const Compact& compact, const int32_t* run_if) {
  ExpandParams expand = expand_params(layer, pattern, compact.base);
  expand.run_if = run_if;
  expand.packed[0] = saved[6].data_ptr();
  expand.compact[0] = compact.g.data_ptr();
  if (layer.gated) {
    expand.packed[1] = saved[7].data_ptr();
    expand.compact[1] = compact.u.data_ptr();
  }
  check(launch_expand(expand, layer.stream), "expanding the saved activations");
}

void compute_again(const Layer& layer, const PatternTensors& pattern, const at::Tensor& plan, const at::Tensor& x,
                   const at::Tensor& slots, const Compact& compact, const int32_t* run_if) {
  const at::Tensor mask_again = at::empty_like(pattern.mask);
  run_gate(layer, x, data<uint64_t>(mask_again), slots.data_ptr(), run_if);
  ExpandParams expand = expand_params(layer, pattern, compact.base);
  expand.run_if = run_if;
  expand.slots = slots.data_ptr();
  expand.compact[0] = compact.g.data_ptr();
  check(launch_expand(expand, layer.stream), "expanding the gate again");
  if (layer.gated) {
    GatherNtParams up = gather_nt_params(layer, pattern, plan, compact.base, GatherNtMode::kUpOnly);
    up.run_if = run_if;
    up.a = x.data_ptr();
    up.weight = layer.w_up();
    up.g_compact = compact.g.data_ptr();
    up.u_compact = compact.u.data_ptr();
    check(launch_gather_nt(up, layer.stream), "the gathered up product again");
  }
}

// From compact g and u, in place.
void run_products(const Layer& layer, const PatternTensors& pattern, const at::Tensor& plan, const Upstream& upstream,
                  const Compact& compact, const Outputs& out, const int32_t* run_if) {
  GatherNtParams dh = gather_nt_params(layer, pattern, plan, compact.base,
                                       layer.gated ? GatherNtMode::kDh : GatherNtMode::kDhPlain);
  dh.run_if = run_if;
  dh.a = upstream.dy.data_ptr();
  dh.weight = layer.w_down.data_ptr();
  dh.g_compact = compact.g.data_ptr();
  dh.u_compact = layer.gated ? compact.u.data_ptr() : nullptr;
  dh.dg_packed = layer.gated ? out.dg.data_ptr() : nullptr;
  dh.du_packed = out.du.data_ptr();
  dh.h_packed = out.h.data_ptr();
  dh.capacity = out.du.numel();
  dh.l1_grad = data_or_null<float>(upstream.dl1);
  check(launch_gather_nt(dh, layer.stream), "the gathered product of dh");
  if (layer.gated) {
    run_gather_down(layer, pattern, compact.g.data_ptr(), layer.w_in.data_ptr(), compact.u.data_ptr(), layer.w_up(),
                    out.dx, run_if);
  } else {
    run_gather_down(layer, pattern, compact.g.data_ptr(), layer.w_in.data_ptr(), nullptr, nullptr, out.dx, run_if);
  }
}

}  // namespace

std::vector<at::Tensor> mlp_input_gradient(const at::Tensor& dy, const OptionalTensor& dl1, const OptionalTensor& x,
                                           const at::Tensor& w_in, const at::Tensor& w_down,
                                           const OptionalTensor& token_mask, const OptionalTensor& order,
                                           int64_t sequences, const std::vector<at::Tensor>& saved, int64_t stream) {
  const Layer layer(dy, w_in, w_down, token_mask, order, sequences, stream);
  const PatternTensors pattern = pattern_of(layer, saved);
  const Upstream upstream{dy, dl1};
  check_upstream(upstream);
  const Outputs out{at::empty_like(dy), layer.worst_case(), layer.worst_case(),
                    layer.gated ? layer.worst_case() : at::Tensor()};
  const at::Tensor plan = run_plan(layer, pattern);
  const Compact compact(layer);
  const Overflow overflow(layer, pattern, saved[6]);
  expand_saved(layer, pattern, saved, compact, overflow.did_not());
  if (x.has_value()) {
    check_input(*x, dy);
    // The slots of the gate product lie where `dh` writes its packed values afterwards.
    compute_again(layer, pattern, plan, *x, out.h, compact, overflow.happened());
  }
  run_products(layer, pattern, plan, upstream, compact, out, x.has_value() ? nullptr : overflow.did_not());
  std::vector<at::Tensor> outputs{out.dx, out.h, out.du};
  if (layer.gated) outputs.push_back(out.dg);
  return outputs;
}

void mlp_input_gradient_again(const at::Tensor& dy, const OptionalTensor& dl1, const at::Tensor& x,
                              const at::Tensor& w_in, const at::Tensor& w_down, const OptionalTensor& token_mask,
                              const OptionalTensor& order, int64_t sequences, const std::vector<at::Tensor>& saved,
                              const at::Tensor& dx, const at::Tensor& h, const at::Tensor& du, const OptionalTensor& dg,
                              int64_t stream) {
  const Layer layer(dy, w_in, w_down, token_mask, order, sequences, stream);
  const PatternTensors pattern = pattern_of(layer, saved);
  const Upstream upstream{dy, dl1};
  check_upstream(upstream);
  check_input(x, dy);
  TORCH_CHECK(dg.has_value() == layer.gated, "megasparse: dg belongs to gated layers");
  const Outputs out{dx, h, du, dg.value_or(at::Tensor())};
  const at::Tensor plan = run_plan(layer, pattern);
  const Compact compact(layer);
  const Overflow overflow(layer, pattern, saved[6]);
  compute_again(layer, pattern, plan, x, out.h, compact, overflow.happened());
  run_products(layer, pattern, plan, upstream, compact, out, overflow.happened());
}

}  // namespace megasparse
