// Tokens times gathered weight rows: `up` of the forward, `dh` of the backward.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>

namespace megasparse {

// For every token tile i (128 tokens) and every column j of its union, with row(i, j) = order[union_idx[i, j]]:
//   acc[t, j] = a[t, :] . weight[row(i, j), :]
// and then one of the epilogues below. Compact buffers: block b (64 union columns) of tile i is the 16-KB block
// block_ptr[i] + b (block_ptr: exclusive scan of ceil(union_count / 64)), [128 tokens][64 columns] of bf16 in the SW128
// image (16-byte chunk c of row r at r * 128 + ((c ^ (r & 7)) * 16)).
// Packed values: row t's non-zeros of g in ascending position from row_ptr[t] on; those of block b start at
// row_ptr[t] + base[block][t % 128]. Rows >= M, columns of padding and other zeros of g give zeros in compact
// buffers and no packed value.
enum class GatherNtMode : int {
  // u = bf16(acc), h = bf16(g * u): g_compact becomes h, u_packed = u, l1_partial = sum of |h| over counted tokens.
  kUp = 0,
  // Only u_compact = u where g != 0, 0 elsewhere. g_compact is read and kept.
  kUpOnly = 1,
  // dh = bf16(acc) + l1_grad * sign(bf16(g * u)) for counted tokens, in fp32: g_compact becomes dg = bf16(dh * u),
  // u_compact becomes du = bf16(dh * g), dg_packed, du_packed and h_packed = bf16(g * u) are written.
  kDh = 2,
  // Non-gated (g_compact holds h): dh = bf16(acc + l1_grad) for counted tokens, rounded once: g_compact becomes du = dh
  // where h != 0, du_packed and h_packed = h are written.
  kDhPlain = 3,
};

constexpr int kGatherNtPartials = 4;  // per work unit

struct GatherNtParams {
  GatherNtMode mode;
  const void* a;               // bf16 [M, D]: x or dy
  const void* weight;          // bf16 [H, D], row per neuron
  const int32_t* order;        // [H] position -> weight row, or null for the identity
  const int32_t* union_idx;    // [Mt, 64 W] ascending positions, padded with -1 up to a multiple of 64
  const int32_t* union_count;  // [Mt]
  const int32_t* plan;         // from launch_gather_nt_plan on the same union_count; read only
  const int64_t* row_ptr;      // [Mp + 1]
  const uint16_t* base;        // [blocks][128]
  void* g_compact;
  void* u_compact;             // kUpOnly, kDh
  void* u_packed;              // kUp
  void* dg_packed;             // kDh
  void* du_packed;             // kDh, kDhPlain
  void* h_packed;              // kDh, kDhPlain; or null: not written
  int64_t capacity;            // values in each packed buffer; those beyond it are not written
  const float* l1_grad;        // kDh, kDhPlain: device scalar, or null for 0
  const uint8_t* token_mask;   // [M] 1 = counted, or null: all are
  float* l1_partial;           // kUp: [gather_nt_max_units * kGatherNtPartials]; the first plan[0] * kGatherNtPartials are
                               // written, their sum in index order is deterministic
  const int32_t* run_if;       // device flag or null: nothing is done if *run_if == 0
  int64_t m;
  int64_t sequences = 1;       // of the M tokens, as everything here numbers them: where `a` has them, see csrc/token_rows.h
  int64_t d;                   // multiple of 8
  int64_t h;
  int sm_count;
};

// Work units (token tile x at most 192 union columns), widest first. plan[0] = their number; deterministic.
int64_t gather_nt_max_units(int64_t m, int64_t h);
size_t gather_nt_plan_bytes(int64_t m, int64_t h);
cudaError_t launch_gather_nt_plan(const int32_t* union_count, int64_t m, int64_t h, int32_t* plan, cudaStream_t stream);

// Errors: cudaErrorInvalidValue for sizes or alignments outside the above, cudaErrorNotSupported without TMA.
cudaError_t launch_gather_nt(const GatherNtParams& params, cudaStream_t stream);

}  // namespace megasparse
