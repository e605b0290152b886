// Compact activations times gathered weight rows: `down` of the forward, `dx` of the backward.
#pragma once

#include <cstdint>
#include <cuda_runtime_api.h>

namespace megasparse {

// out[t, :] = sum over the union columns j of t's token tile of
//             a0[t, j] * w0[row(j), :]  (+ a1[t, j] * w1[row(j), :])
//
// A token tile is 128 consecutive tokens; its union is cut into blocks of 64 columns. Block b of tile i has index
// block_ptr[i] + b, in the compact buffers (16 KB a block) as in `union_idx` (64 entries a block).
struct GatherNnArgs {
  const void* a0;              // bf16 blocks [128 tokens][64 columns], each in its SW128 K-major shared-memory image
  const void* a1;              // the second product's blocks, or null
  const void* w0;              // bf16 [H, D], row per neuron
  const void* w1;              // bf16 [H, D], or null with a1
  const int32_t* union_idx;    // [64 * blocks], ascending within a tile, -1 = padding
  const int32_t* order;        // [H] position -> weight row, or null if union_idx already holds weight rows
  const int32_t* union_count;  // [ceil(M / 128)] columns in each tile's union
  const int32_t* block_ptr;    // [ceil(M / 128)] (or one more) first block of each tile
  const int32_t* plan;         // written by launch_gather_nn_plan for the same union_count
  int32_t* counter;            // one of the plan's zeroed counters, not used by any other launch since
  void* out;                   // bf16 [M, D], fully written (tiles with an empty union get zeros)
  int64_t m;
  int64_t d;                   // multiple of 8
  int sm_count;                // multiprocessors to use
};

// The plan is int32 [ceil(M / 128) + kGatherNnCounters]: token tiles, largest union first, then zeroed work counters.
// One plan serves up to kGatherNnCounters launches (pass plan + ceil(M / 128) + i as the counter of launch i).
constexpr int kGatherNnCounters = 4;
cudaError_t launch_gather_nn_plan(const int32_t* union_count, int64_t tiles, int32_t* plan, cudaStream_t stream);

cudaError_t launch_gather_nn(const GatherNnArgs& args, cudaStream_t stream);

}  // namespace megasparse
