// Gate product with the packing epilogue.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>

namespace megasparse {

// g = bf16(relu(x W^T)) kept as non-zeros only. Mp = 128 * ceil(M / 128), W = ceil(H / 64), position p is weight row
// order[p]. A value is non-zero if it is after rounding to bf16; relu keeps NaN, which counts as non-zero.
struct GateParams {
  const void* x;         // bf16 [M, D]
  const void* weight;    // bf16 [H, D]
  const int32_t* order;  // [H], or null for the identity
  void* workspace;       // gate_workspace_bytes, 16-byte aligned; may be null where that is 0
  uint64_t* mask;        // [Mp, W]: bit j of word w of row t is set iff g[t, 64 w + j] != 0. Fully written, rows >= M too
  void* arena;           // bf16 [Mp, 64 W]: element i of word w's slot (64 w + i) = its i-th non-zero; the rest undefined
  const int32_t* run_if; // device flag or null: nothing is done if *run_if == 0
  int64_t m;
  int64_t sequences = 1; // of the M tokens, which are rows t of the mask: where x has them, see csrc/token_rows.h
  int64_t d;             // multiple of 8
  int64_t h;
  int sm_count;
};

// Bytes of scratch: a copy of the weight in position order, where `order` is given or H is no multiple of 64.
size_t gate_workspace_bytes(int64_t h, int64_t d, bool has_order);

// Errors: cudaErrorInvalidValue for sizes or alignments outside the above, cudaErrorNotSupported without TMA.
cudaError_t launch_gate(const GateParams& params, cudaStream_t stream);

}  // namespace megasparse
