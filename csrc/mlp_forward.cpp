// Forward: gate product packed in slots -> lists -> compact blocks -> up over unions -> down over unions.
#include <ATen/ops/empty_like.h>

#include "layer.h"


namespace megasparse {
namespace {

struct Statistics {
  at::Tensor l1, counts, fired, tile_counts;
};

PatternTensors make_lists(const Layer& layer, at::Tensor mask, const Statistics& statistics) {
  PatternTensors pattern{
      std::move(mask),
      layer.empty({layer.padded_tokens(), layer.words}, at::kShort),
      layer.empty({layer.padded_tokens() + 1}, at::kLong),
      layer.empty({layer.tiles, layer.words}, at::kLong),
      layer.empty({layer.tiles, layer.padded_hidden()}, at::kInt),
      layer.empty({3, layer.tiles + 1}, at::kInt),
  };
  const at::Tensor scratch = layer.empty({layer.padded_tokens() + 3 * layer.tiles}, at::kInt);
  const at::Tensor counted_words = at::empty_like(pattern.union_words);
  ListsParams p{};
  p.mask = data<uint64_t>(pattern.mask);
  p.order = layer.order;
  p.token_mask = layer.token_mask;
  p.offset = data<uint16_t>(pattern.offset);
  p.row_ptr = data<int64_t>(pattern.row_ptr);
  p.union_words = data<uint64_t>(pattern.union_words);
  p.union_index = data<int32_t>(pattern.union_index);
  p.tile_info = data<int32_t>(pattern.tile_info);
  p.counts = data<int64_t>(statistics.counts);
  p.fired = data<bool>(statistics.fired);
  p.tile_counts = data<int32_t>(statistics.tile_counts);
  p.counted_words = data<uint64_t>(counted_words);
  p.scratch = data<int32_t>(scratch);
  p.m = layer.m;
  p.h_size = layer.h;
  check(launch_lists(p, layer.stream), "making the lists");
  return pattern;
}

}  // namespace

std::vector<at::Tensor> mlp_forward(const at::Tensor& x, const at::Tensor& w_in, const at::Tensor& w_down,
                                    const OptionalTensor& token_mask, const OptionalTensor& order, int64_t sequences,
                                    bool save, int64_t capacity, int64_t stream) {
  const Layer layer(x, w_in, w_down, token_mask, order, sequences, stream);
  const int64_t saved = save ? capacity : 0;
  Statistics statistics{layer.empty({}, at::kFloat), layer.empty({4}, at::kLong), layer.empty({layer.h}, at::kBool),
                        layer.empty({layer.h}, at::kInt)};

  at::Tensor mask = layer.empty({layer.padded_tokens(), layer.words}, at::kLong);
  at::Tensor slots = layer.worst_case();
  run_gate(layer, x, data<uint64_t>(mask), slots.data_ptr(), nullptr);
  const PatternTensors pattern = make_lists(layer, mask, statistics);

  const int64_t blocks = layer.tiles * layer.words;
  const at::Tensor compact = layer.worst_case();  // g, then h
  const at::Tensor base = layer.empty({blocks, 128}, at::kShort);
  const at::Tensor g = layer.empty({saved}, at::kBFloat16);
  const int64_t partials = layer.gated ? gather_nt_max_units(layer.m, layer.h) * kGatherNtPartials : blocks;
  const at::Tensor l1_partial = layer.empty({partials}, at::kFloat);
  ExpandParams expand = expand_params(layer, pattern, base);
  expand.slots = slots.data_ptr();
  expand.compact[0] = compact.data_ptr();
  expand.packed_out = saved ? g.data_ptr() : nullptr;
  expand.packed_capacity = saved;
  expand.l1_partial = layer.gated ? nullptr : data<float>(l1_partial);
  check(launch_expand(expand, layer.stream), "expanding the gate");
  slots.reset();

  const int32_t* partial_count = data<int32_t>(pattern.tile_info) + kBlockPtr * (layer.tiles + 1) + layer.tiles;
  at::Tensor plan, u;
  if (layer.gated) {
    plan = run_plan(layer, pattern);
    u = layer.empty({saved}, at::kBFloat16);
    GatherNtParams up = gather_nt_params(layer, pattern, plan, base, GatherNtMode::kUp);
    up.a = x.data_ptr();
    up.weight = layer.w_up();
    up.g_compact = compact.data_ptr();
    up.u_packed = saved ? u.data_ptr() : nullptr;
    up.capacity = saved;
    up.l1_partial = data<float>(l1_partial);
    check(launch_gather_nt(up, layer.stream), "the gathered up product");
    partial_count = data<int32_t>(plan);
  }
  at::Tensor y = at::empty_like(x);
  run_gather_down(layer, pattern, compact.data_ptr(), w_down.data_ptr(), nullptr, nullptr, y, nullptr);
  check(launch_sum(data<float>(l1_partial), partial_count, layer.gated ? kGatherNtPartials : 1,
                   data<float>(statistics.l1), layer.stream),
        "the L1 sum");

  std::vector<at::Tensor> outputs{y, statistics.l1, statistics.counts, statistics.fired, statistics.tile_counts};
  if (save) {
    outputs.insert(outputs.end(), {pattern.mask, pattern.offset, pattern.row_ptr, pattern.union_words,
                                   pattern.union_index, pattern.tile_info, g});
    if (layer.gated) outputs.push_back(u);
  }
  return outputs;
}

}  // namespace megasparse
