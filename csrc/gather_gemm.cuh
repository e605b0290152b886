// Shared parts of the two products whose B operand is gathered rows read along their length (MN-major B):
// down/dx (gather_down.cu) and the weight gradients (wgrad.cu).
//
//   C[128, 256] += A[128, 64 k] * B[64 k, 256]      B[k, :] = 512 contiguous bytes of row rows[k] of a matrix [*, D]
//
// One warpgroup gathers B with cp.async, two consumer warpgroups run wgmma m64n256k16 on a ring of stages, and work
// units come from a counter in global memory, claimed one unit ahead.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>

#include "hopper/bf16.cuh"
#include "hopper/copy.cuh"
#include "hopper/mbarrier.cuh"
#include "hopper/store.cuh"
#include "hopper/wgmma.cuh"

namespace megasparse {

constexpr int kTileM = 128;
constexpr int kTileN = 256;
constexpr int kTileK = 64;
constexpr int kABytes = kTileM * kTileK * 2;  // 16 KB: two 8 KB halves, one a consumer warpgroup
constexpr int kBBytes = kTileK * kTileN * 2;  // 32 KB: four slabs [64 k][64 n] of 8 KB
constexpr int kSlabBytes = kTileK * 128;
constexpr int kConsumerWarps = 8;

// Per-warp staging of the epilogue: 16 rows of 64 bf16, padded by 16 bytes against bank conflicts.
constexpr int kEpiloguePitch = 144;
constexpr int kEpilogueWarpBytes = 16 * kEpiloguePitch;

// Gathers B stages: four warps, 16 k-rows each. Eight lanes copy a row, 128 bytes at a time, so that a lane works out
// four addresses for 16 copies. One warp a scheduler issues all of it: every instruction here counts.
struct Gather {
  uint32_t slab;       // shared address of the lane's piece of its first k-row, slab 0, stage 0
  uint32_t row_bytes;  // of the matrix
  int list_at;         // first of the lane's four entries in a k-step's list of 64 rows

  __device__ __forceinline__ Gather(uint32_t b_stage, int warp, int lane, int64_t d) {
    const int row = warp * 16 + (lane >> 3) * 4;
    list_at = row;
    slab = b_stage + row * 128 + (((lane & 7) ^ (row & 7)) << 4);
    row_bytes = static_cast<uint32_t>(d) * 2;
  }
  // `rows`: matrix rows of the lane's k-rows, negative = zeros. `piece`: the lane's first bytes in row 0. Bit j of
  // `columns`: the lane's piece of slab j exists.
  template <bool kAllColumns>
  __device__ __forceinline__ void copy(uint32_t stage_bytes, const uint8_t* piece, int4 rows, uint32_t columns) const {
    const int row[4] = {rows.x, rows.y, rows.z, rows.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* src = piece + static_cast<uint64_t>(static_cast<uint32_t>(max(row[i], 0))) * row_bytes;
      const uint32_t dst = (slab ^ (i << 4)) + stage_bytes + i * 128;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        hopper::cp_async_16(dst + j * kSlabBytes, src + j * 128, row[i] >= 0 && (kAllColumns || (columns >> j & 1)));
      }
    }
  }
};

// k-steps of one unit on one consumer warpgroup. `a_desc`/`b_desc` describe stage 0; kAMajorMN: A stored [k][m].
template <int kStages, int kStageBytes, bool kAMajorMN>
__device__ __forceinline__ void mma_unit(float (&acc)[128], int ksteps, uint64_t a_desc, uint64_t b_desc,
                                         uint64_t* full, uint64_t* empty, hopper::RingState<kStages>& ring, int lane) {
  // K advances by 16 a wgmma: 32 bytes along a K-major row, 16 rows of 128 bytes in an MN-major slab.
  constexpr uint64_t kAStep = (kAMajorMN ? 16 * 128 : 32) >> 4;
  constexpr uint64_t kBStep = (16 * 128) >> 4;
  int previous = 0;
  for (int k = 0; k < ksteps; ++k) {
    hopper::mbarrier_wait(&full[ring.stage], ring.parity);
    const uint64_t a = a_desc + ring.stage * (kStageBytes >> 4);
    const uint64_t b = b_desc + ring.stage * (kStageBytes >> 4);
    hopper::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kTileK / 16; ++kk) {
      hopper::Wgmma<256, kAMajorMN, 1>::run(acc, a + kk * kAStep, b + kk * kBStep, k > 0 || kk > 0);
    }
    hopper::wgmma_commit();
    if (k > 0) {
      hopper::wgmma_wait<1>();
      if (lane == 0) hopper::mbarrier_arrive(&empty[previous]);
    }
    previous = ring.stage;
    ring.advance();
  }
  hopper::wgmma_wait<0>();
  hopper::wgmma_fence_operand(acc);
  if (ksteps > 0 && lane == 0) hopper::mbarrier_arrive(&empty[previous]);
}

// Writes a warp's 16 x 256 share of the accumulators as bf16, 128 bytes of a row at a time. row_pointer(r) gives the
// first element of output row r of the warp's 16, or null for a row that does not exist.
template <class RowPointer>
__device__ __forceinline__ void store_bf16_tile(const float (&acc)[128], uint8_t* staging, int lane, int column,
                                                int64_t d, RowPointer row_pointer) {
  // stmatrix: lanes 8 i .. 8 i + 7 give the rows of 8x8 matrix i; matrices 0/1 are rows 0-7/8-15 of a column block of
  // 8, 2/3 those of the next.
  const uint32_t staged = hopper::smem_addr(staging);
  const uint32_t write = staged + ((lane & 7) + (lane & 8)) * kEpiloguePitch + (lane >> 4) * 16;
  const uint8_t* read = staging + (lane >> 3) * kEpiloguePitch + (lane & 7) * 16;
#pragma unroll
  for (int group = 0; group < 4; ++group) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float* v = acc + (group * 8 + j) * 4;
      hopper::stmatrix_x4(write + j * 16, hopper::pack_bf16(v[0], v[1]), hopper::pack_bf16(v[2], v[3]),
                          hopper::pack_bf16(v[4], v[5]), hopper::pack_bf16(v[6], v[7]));
    }
    __syncwarp();
    const int64_t c = column + group * 64 + (lane & 7) * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 value = *reinterpret_cast<const uint4*>(read + i * 4 * kEpiloguePitch);
      __nv_bfloat16* row = row_pointer(i * 4 + (lane >> 3));
      if (row != nullptr && c < d) *reinterpret_cast<uint4*>(row + c) = value;
    }
    __syncwarp();
  }
}

}  // namespace megasparse
