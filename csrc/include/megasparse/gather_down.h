// Compact activations times gathered weight rows: `down` of the forward, `dx` of the backward.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>

namespace megasparse {

// out[t, :] = sum over the columns j of the union of t's token tile of
//             a0[t, j] * w0[row(j), :]  (+ a1[t, j] * w1[row(j), :])
//
// A token tile is 128 consecutive tokens; its union is cut into blocks of 64 columns. Tiles with an empty union write
// zeros. `down`: a0 = h, w0 = W_down. `dx`: a0 = dg, w0 = W_gate, a1 = du, w1 = W_up (non-gated: a0 = du alone).
struct GatherDownParams {
  const void* a0;              // bf16 blocks [128 tokens][64 columns], each in its SW128 K-major shared-memory image;
                               // block b of tile i has index block_ptr[i] + b; columns past the union hold zeros
  const void* a1;              // the second product's blocks, or null
  const void* w0;              // bf16 [H, D], row per neuron
  const void* w1;              // bf16 [H, D], or null with a1
  const int32_t* union_idx;    // [Mt, union_stride] positions, ascending, padded with -1 to a multiple of 64
  const int32_t* order;        // [H] position -> weight row, or null for the identity
  const int32_t* block_ptr;    // [Mt + 1] exclusive scan of ceil(union / 64)
  const int32_t* tile_order;   // [Mt] token tiles, largest union first; Mt = ceil(M / 128)
  void* out;                   // bf16 [M, D]
  const int32_t* run_if;       // device flag or null: `out` is left alone if *run_if == 0
  int64_t m;
  int64_t sequences = 1;       // of the M tokens, as everything here numbers them: where `out` has them, see csrc/token_rows.h
  int64_t d;                   // multiple of 8
  int64_t union_stride;        // multiple of 64
  int sm_count;                // multiprocessors to use
};

// Bytes of scratch (256-byte aligned, not initialised) that launch_gather_down needs; depends on m, union_stride and
// whether there is an order.
size_t gather_down_workspace_bytes(const GatherDownParams& params);

cudaError_t launch_gather_down(const GatherDownParams& params, void* workspace, cudaStream_t stream);

}  // namespace megasparse
