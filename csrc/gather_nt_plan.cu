// Cuts the union columns of all token tiles into work units of the gathered products. One small CTA: reads 4 bytes a token
// tile, writes 16 bytes a unit.

#include "gather_nt_unit.h"
#include "megasparse/gather_nt.h"

namespace megasparse {
namespace {

// Units of kUnitMaxBlocks blocks, tile after tile, then the tiles' remainders, widest first. One CTA; thread t owns a run of tiles.
__global__ void __launch_bounds__(1024) plan_kernel(const int32_t* union_count, int tiles, int32_t* plan) {
  constexpr int kSums = kUnitMaxBlocks + 1;  // units of kUnitMaxBlocks, .., 1 blocks; blocks
  __shared__ int warp_sums[32][kSums];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int run = (tiles + 1023) / 1024;
  const int begin = min(static_cast<int>(threadIdx.x) * run, tiles), end = min(begin + run, tiles);
  int own[kSums] = {};
  for (int tile = begin; tile < end; ++tile) {
    const int blocks = (union_count[tile] + kUnitBlock - 1) / kUnitBlock;
    own[0] += blocks / kUnitMaxBlocks;
#pragma unroll
    for (int i = 1; i < kUnitMaxBlocks; ++i) own[i] += blocks % kUnitMaxBlocks == kUnitMaxBlocks - i;
    own[kUnitMaxBlocks] += blocks;
  }
  int scan[kSums];
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    int sum = own[i];
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFFu, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) warp_sums[warp][i] = sum;
    scan[i] = sum - own[i];
  }
  __syncthreads();
  int total[kSums] = {};
  for (int w = 0; w < 32; ++w) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      if (w < warp) scan[i] += warp_sums[w][i];
      total[i] += warp_sums[w][i];
    }
  }
  int units_before = 0;
#pragma unroll
  for (int i = 0; i < kUnitMaxBlocks; ++i) {
    scan[i] += units_before;
    units_before += total[i];
  }
  if (threadIdx.x == 0) plan[0] = units_before;
  int4* units = reinterpret_cast<int4*>(plan + kPlanHeader);
  int compact_block = scan[kUnitMaxBlocks];
  for (int tile = begin; tile < end; ++tile) {
    const int blocks = (union_count[tile] + kUnitBlock - 1) / kUnitBlock;
    int first = 0;
    for (; first + kUnitMaxBlocks <= blocks; first += kUnitMaxBlocks) {
      units[scan[0]++] = make_int4(tile, first, kUnitMaxBlocks, compact_block + first);
    }
#pragma unroll
    for (int i = 1; i < kUnitMaxBlocks; ++i) {
      if (blocks - first == kUnitMaxBlocks - i) units[scan[i]++] = make_int4(tile, first, blocks - first, compact_block + first);
    }
    compact_block += blocks;
  }
}

}  // namespace

int64_t gather_nt_max_units(int64_t m, int64_t h) {
  return (m + kUnitTokens - 1) / kUnitTokens * ((h + kUnitBlock * kUnitMaxBlocks - 1) / (kUnitBlock * kUnitMaxBlocks));
}

size_t gather_nt_plan_bytes(int64_t m, int64_t h) { return kPlanHeader * 4 + gather_nt_max_units(m, h) * sizeof(Unit); }

cudaError_t launch_gather_nt_plan(const int32_t* union_count, int64_t m, int64_t h, int32_t* plan, cudaStream_t stream) {
  if (m < 0 || h <= 0 || plan == nullptr) return cudaErrorInvalidValue;
  plan_kernel<<<1, 1024, 0, stream>>>(union_count, static_cast<int>((m + kUnitTokens - 1) / kUnitTokens), plan);
  return cudaGetLastError();
}

}  // namespace megasparse
