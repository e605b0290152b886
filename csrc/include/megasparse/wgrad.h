// Weight gradients of the sparse MLP from packed activations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>

namespace megasparse {

enum class WgradOutput : int {
  kBf16 = 0,        // bf16, every row written
  kFp32 = 1,        // fp32, every row written
  kFp32Accumulate = 2,  // fp32, added to what is there (Megatron's main_grad)
};

// With p the position of a neuron, n = order[p] its weight row, T_p the tokens t where bit p of the mask is set:
//   gated:      dw_in[n, :]     = sum over t in T_p of dg[t, p] * x[t, :]
//               dw_in[H + n, :] = sum over t in T_p of du[t, p] * x[t, :]
//               dw_down[n, :]   = sum over t in T_p of bf16(g[t, p] * u[t, p]) * dy[t, :]
//   non-gated:  dw_in[n, :]     = sum over t in T_p of du[t, p] * x[t, :]
//               dw_down[n, :]   = sum over t in T_p of g[t, p] * dy[t, :]     (g holds h)
struct WgradArgs {
  const int64_t* mask;      // [m_rows, W], W = ceil(H / 64): bit j of mask[t, w] = position 64 w + j of token t is active
  const int16_t* offset;    // [m_rows, W] (unsigned) packed values of the row before the word's first
  const int64_t* row_ptr;   // [m_rows + 1] first packed value of each row
  const void* g;            // bf16 [capacity]; a 16-byte aligned base, allocation a multiple of 16 bytes; same for u, dg, du
  const void* u;            // null if not gated
  const void* dg;           // null if not gated
  const void* du;
  const void* x;            // bf16 [M, D]
  const void* dy;           // bf16 [M, D]
  const int32_t* order;     // [H] position -> weight row, or null for the identity
  void* dw_in;              // [2 H, D] gated (gate rows, then up rows), [H, D] otherwise; row stride D
  void* dw_down;            // [H, D]
  WgradOutput output;       // of all three
  bool gated;
  int64_t m;
  int64_t m_rows;           // rows of mask/offset: 128 * ceil(M / 128); rows >= M have no bits set
  int64_t h;
  int64_t d;                // multiple of 8
  int64_t capacity;         // values in the packed buffers (>= row_ptr[m_rows] or the results are void)
  const int32_t* skip;      // device flag or null: every kernel returns at once if *skip != 0
  int sm_count;             // multiprocessors to use
};

// Bytes of 256-byte aligned scratch that launch_wgrad needs; depends on sizes and capacity alone. Not initialised.
size_t wgrad_workspace_bytes(const WgradArgs& args);

// Makes its own token lists from the mask. Deterministic: one owner per output element, fixed order of summation.
cudaError_t launch_wgrad(const WgradArgs& args, void* workspace, cudaStream_t stream);

}  // namespace megasparse
