// What forward and backward share: sizes, checks, buffers.
#pragma once

#include <cstdint>
#include <string>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include "megasparse/gate.h"
#include "megasparse/gather_down.h"
#include "megasparse/gather_nt.h"
#include "megasparse/lists.h"
#include "megasparse/wgrad.h"
#include "mlp.h"
#include "token_rows.h"

namespace megasparse {

inline void check(cudaError_t error, const char* what) {
  TORCH_CHECK(error == cudaSuccess, "megasparse: ", what, " failed: ", cudaGetErrorString(error));
}

template <typename T>
T* data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
T* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

// Sizes of one call, and where its tensors are.
struct Layer {
  int64_t m, d, h;       // tokens, width, neurons of this rank
  int64_t sequences;     // of the tokens (token_rows.h)
  int64_t tiles, words;  // token tiles of 128, position tiles of 64
  bool gated;
  int sm_count;
  cudaStream_t stream;
  at::TensorOptions options;  // of the tokens
  const at::Tensor& w_in;
  const at::Tensor& w_down;
  const int32_t* order;
  const bool* token_mask;  // in the order of the tokens

  // tokens: x, or dy, which is like it.
  Layer(const at::Tensor& tokens, const at::Tensor& w_in, const at::Tensor& w_down, const OptionalTensor& token_mask,
        const OptionalTensor& order, int64_t sequences, int64_t stream)
      : m(tokens.size(0)), d(tokens.size(1)), h(w_down.size(0)), sequences(sequences), tiles((m + 127) / 128),
        words((h + 63) / 64), gated(w_in.size(0) != h), stream(reinterpret_cast<cudaStream_t>(stream)),
        options(tokens.options()), w_in(w_in), w_down(w_down), order(data_or_null<int32_t>(order)),
        token_mask(data_or_null<bool>(token_mask)) {
    for (const at::Tensor* tensor : {&tokens, &w_in, &w_down}) {
      TORCH_CHECK(tensor->is_cuda() && tensor->scalar_type() == at::kBFloat16 && tensor->is_contiguous(),
                  "megasparse: the kernels take contiguous bf16 CUDA tensors");
    }
    TORCH_CHECK(m > 0, "megasparse: the kernels need at least one token");
    TORCH_CHECK(valid_sequences(m, sequences), "megasparse: ", m, " tokens are not ", sequences,
                " sequences of whole tiles of 128");
    TORCH_CHECK(!order.has_value() || order->is_contiguous(), "megasparse: order must be contiguous");
    TORCH_CHECK(!token_mask.has_value() || token_mask->is_contiguous(), "megasparse: token_mask must be contiguous");
    check(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, tokens.get_device()),
          "asking for the device");
  }

  int64_t padded_tokens() const { return tiles * 128; }
  int64_t padded_hidden() const { return words * 64; }
  const void* w_up() const {
    return static_cast<const char*>(w_in.data_ptr()) + h * d * static_cast<int64_t>(sizeof(uint16_t));
  }
  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType type) const { return at::empty(sizes, options.dtype(type)); }
  // A bf16 buffer for every entry of [M, H] there could be, padded to whole tiles.
  at::Tensor worst_case() const { return empty({padded_tokens() * padded_hidden()}, at::kBFloat16); }
};

// The pattern of active neurons and its lists: what forward makes and backward reads, in saved order.
struct PatternTensors {
  at::Tensor mask, offset, row_ptr, union_words, union_index, tile_info;
};

// Relu gate product (W_up where there is no gate), packed in slots; into pattern.mask.
inline void run_gate(const Layer& layer, const at::Tensor& x, uint64_t* mask, void* slots, const int32_t* run_if) {
  const auto bytes = static_cast<int64_t>(gate_workspace_bytes(layer.h, layer.d, layer.order != nullptr));
  const at::Tensor workspace = layer.empty({bytes}, at::kByte);
  GateParams p{};
  p.x = x.data_ptr();
  p.weight = layer.w_in.data_ptr();
  p.order = layer.order;
  p.workspace = bytes ? workspace.data_ptr() : nullptr;
  p.mask = mask;
  p.arena = slots;
  p.run_if = run_if;
  p.m = layer.m;
  p.sequences = layer.sequences;
  p.d = layer.d;
  p.h = layer.h;
  p.sm_count = layer.sm_count;
  check(launch_gate(p, layer.stream), "the gate product");
}

// The work units of the gathered products with neurons on N.
inline at::Tensor run_plan(const Layer& layer, const PatternTensors& pattern) {
  const auto bytes = static_cast<int64_t>(gather_nt_plan_bytes(layer.m, layer.h));
  at::Tensor plan = layer.empty({bytes / 4}, at::kInt);
  check(launch_gather_nt_plan(data<int32_t>(pattern.tile_info), layer.m, layer.h, data<int32_t>(plan), layer.stream),
        "planning");
  return plan;
}

inline GatherNtParams gather_nt_params(const Layer& layer, const PatternTensors& pattern, const at::Tensor& plan,
                                       const at::Tensor& base, GatherNtMode mode) {
  const int32_t* info = data<int32_t>(pattern.tile_info);
  GatherNtParams p{};
  p.mode = mode;
  p.order = layer.order;
  p.union_idx = data<int32_t>(pattern.union_index);
  p.union_count = info + kUnionCount * (layer.tiles + 1);
  p.plan = data<int32_t>(plan);
  p.row_ptr = data<int64_t>(pattern.row_ptr);
  p.base = data<uint16_t>(base);
  p.token_mask = reinterpret_cast<const uint8_t*>(layer.token_mask);
  p.m = layer.m;
  p.sequences = layer.sequences;
  p.d = layer.d;
  p.h = layer.h;
  p.sm_count = layer.sm_count;
  return p;
}

inline ExpandParams expand_params(const Layer& layer, const PatternTensors& pattern, const at::Tensor& base) {
  ExpandParams p{};
  p.mask = data<uint64_t>(pattern.mask);
  p.offset = data<uint16_t>(pattern.offset);
  p.row_ptr = data<int64_t>(pattern.row_ptr);
  p.union_words = data<uint64_t>(pattern.union_words);
  p.union_index = data<int32_t>(pattern.union_index);
  p.tile_info = data<int32_t>(pattern.tile_info);
  p.base = data<uint16_t>(base);
  p.token_mask = layer.token_mask;
  p.m = layer.m;
  p.h_size = layer.h;
  return p;
}

// out [M, D] = a0 (x) rows of w0 (+ a1 (x) rows of w1), (x) over the unions. Untouched where *run_if is 0.
inline void run_gather_down(const Layer& layer, const PatternTensors& pattern, const void* a0, const void* w0,
                            const void* a1, const void* w1, const at::Tensor& out, const int32_t* run_if) {
  const int32_t* info = data<int32_t>(pattern.tile_info);
  GatherDownParams p{};
  p.a0 = a0;
  p.a1 = a1;
  p.w0 = w0;
  p.w1 = w1;
  p.union_idx = data<int32_t>(pattern.union_index);
  p.order = layer.order;
  p.block_ptr = info + kBlockPtr * (layer.tiles + 1);
  p.tile_order = info + kTileOrder * (layer.tiles + 1);
  p.out = out.data_ptr();
  p.run_if = run_if;
  p.m = layer.m;
  p.sequences = layer.sequences;
  p.d = layer.d;
  p.union_stride = layer.padded_hidden();
  p.sm_count = layer.sm_count;
  const at::Tensor workspace = layer.empty({static_cast<int64_t>(gather_down_workspace_bytes(p))}, at::kByte);
  check(launch_gather_down(p, workspace.data_ptr(), layer.stream), "the gathered down product");
}

}  // namespace megasparse
