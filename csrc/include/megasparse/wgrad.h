// Weight gradients of the sparse MLP from packed activations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>

namespace megasparse {

enum class WgradOutput : int {
  kBf16 = 0,            // bf16, every row written
  kFp32 = 1,            // fp32, every row written
  kFp32Accumulate = 2,  // fp32, added to what is there (Megatron's main_grad)
};

// With p the position of a neuron, n = order[p] its weight row, T_p the tokens t where bit p of the mask is set:
//   gated:      dw_in[n, :]     = sum over t in T_p of dg[t, p] * x[t, :]
//               dw_in[H + n, :] = sum over t in T_p of du[t, p] * x[t, :]
//   non-gated:  dw_in[n, :]     = sum over t in T_p of du[t, p] * x[t, :]
//   both:       dw_down[n, :]   = sum over t in T_p of h[t, p] * dy[t, :]
struct WgradParams {
  const int64_t* mask;      // [Mp, W], Mp = 128 * ceil(M / 128), W = ceil(H / 64): bit j of mask[t, w] = position
                            // 64 w + j of token t is active; rows >= M hold zeros
  const int16_t* offset;    // [Mp, W] (unsigned): packed values of row t before those of mask[t, w]
  const int64_t* row_ptr;   // [Mp + 1] first packed value of each row
  const void* dg;           // bf16 packed values; null if not gated. Each packed buffer starts at a multiple of 16
  const void* du;           // bytes and is readable up to the next multiple of 16 bytes past its last value.
  const void* h;
  const void* x;            // bf16 [M, D]
  const void* dy;           // bf16 [M, D]
  const int32_t* order;     // [H] position -> weight row, or null for the identity
  void* dw_in;              // [2 H, D] gated (gate rows, then up rows), [H, D] otherwise
  void* dw_down;            // [H, D]
  WgradOutput output;       // of both
  bool gated;
  int64_t m;
  int64_t sequences = 1;    // of the M tokens t: where x and dy have them, see csrc/token_rows.h
  int64_t h_size;           // H
  int64_t d;                // multiple of 8
  int sm_count;             // multiprocessors to use
};

// Bytes of scratch (256-byte aligned, not initialised) that launch_wgrad needs: the worst case, 3 * Mp * 64 W bf16 gated
// (2 otherwise) and some tens of MB. Depends on m, sequences, h_size, d, gated,
// sm_count. Only what is active is touched.
size_t wgrad_workspace_bytes(const WgradParams& params);

// Makes its own token lists from the mask. Deterministic: one owner per output element, fixed order of summation.
cudaError_t launch_wgrad(const WgradParams& params, void* workspace, cudaStream_t stream);

}  // namespace megasparse
