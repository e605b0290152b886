// Gate product g = bf16(relu(x W^T)) whose epilogue keeps only non-zeros: bit mask and packed slots (see gate.h).
//
// Work: FLOPs = 2 M D H, dense. Bound: the tensor cores. Bytes into the SMs per tile of 128 x 256: (128 + 256 / 2) * D * 2
// with the weight tile shared by a cluster of two CTAs (128 FLOP a byte); written: M H / 8 of mask and, per non-empty slot,
// the sectors its values touch. Measured on one H200, M 16384, D 2048, H 5632, mean L0 309: 0.488 ms, cuBLAS's product alone
// 0.490 ms (90 % of the tensor cores' peak at the clock of the run); 0.613 ms at mean L0 2800. A permuted weight adds 0.013 ms.
//
// Persistent clusters of two CTAs: the two take neighbouring token tiles and the same 256 positions, and each loads half of
// the weight tile for both (TMA multicast). One thread fills a ring of 48-KB stages. Warpgroups 1 and 2 multiply 64 tokens
// each and leave bf16(relu) in shared memory. The other three warps of warpgroup 0 run the epilogue from there while the next
// tile is multiplied.
//
// Position j of a 64-position tile goes to row n(j) of B's 64-row tile, n(16 q + 2 i + e) = 8 i + 2 q + e (the tensor map's
// five dimensions do that): lane q of a quad then holds the 16 consecutive positions 16 q .. 16 q + 15 of its two
// accumulator rows.

#include "megasparse/gate.h"

#include "hopper/bf16.cuh"
#include "hopper/copy.cuh"
#include "hopper/mbarrier.cuh"
#include "hopper/tensor_map.h"
#include "hopper/wgmma.cuh"
#include "token_rows.h"

namespace megasparse {
namespace {

using namespace hopper;

constexpr int kTokens = 128;
constexpr int kTile = 64;   // positions of a mask word
constexpr int kTiles = 4;   // of them in a CTA tile
constexpr int kDepth = 64;  // elements of D per stage
constexpr int kStages = 3;
constexpr int kCluster = 2;
constexpr int kThreads = 384;
constexpr int kGroup = 8;   // clusters of token tiles that go through all positions together, for L2 locality
constexpr int kBytesA = kTokens * kDepth * 2;
constexpr int kBytesTile = kTile * kDepth * 2;
constexpr int kStageBytes = kBytesA + kTiles * kBytesTile;
constexpr int kEpilogueWarps = 3;
constexpr int kBlockBytes = kTokens * kTile * 2;
constexpr int kSlotBytes = kTile * 2 + 16;  // a row's slot in shared memory: stride without bank conflicts
constexpr int kRows = 16;                   // that an epilogue warp treats together

struct Shared {
  alignas(1024) uint8_t stage[kStages][kStageBytes];
  uint8_t result[kTiles][kBlockBytes];  // bf16 relu of 64 positions each, rows of 128 bytes in the 128-byte swizzle
  alignas(16) uint8_t slots[kEpilogueWarps][kRows * kSlotBytes];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  uint64_t result_full;
  uint64_t result_empty;
};
constexpr int kSharedBytes = sizeof(Shared);

struct Args {
  uint64_t* mask;
  uint16_t* arena;
  const int32_t* run_if;
  int64_t h;
  TokenRows rows;   // of x
  int words;        // 64-position tiles
  int token_tiles;
  int steps;        // stages along D
};

struct Place {
  int token_tile;
  int first_word;
};
// Cluster tiles in groups of kGroup token-tile pairs; within a group the position tile is the slow index.
__device__ __forceinline__ Place place(int index, const Args& p, uint32_t rank) {
  const int pairs = (p.token_tiles + kCluster - 1) / kCluster, columns = (p.words + kTiles - 1) / kTiles;
  const int group = index / (kGroup * columns);
  const int height = min(kGroup, pairs - group * kGroup);
  const int within = index - group * kGroup * columns;
  const int column = within / height, pair = group * kGroup + within - column * height;
  return {pair * kCluster + static_cast<int>(rank), column * kTiles};
}

__device__ __forceinline__ void produce(const Args& p, const CUtensorMap* map_x, const CUtensorMap* map_w, Shared& s,
                                        uint32_t rank, int cluster, int clusters, int places) {
  RingState<kStages> ring;
  for (int index = cluster; index < places; index += clusters) {
    const Place at = place(index, p, rank);
    const TokenRows::Place tokens = p.rows.place(at.token_tile * kTokens);
    for (int step = 0; step < p.steps; ++step) {
      mbarrier_wait(&s.empty[ring.stage], ring.parity ^ 1);
      uint8_t* stage = s.stage[ring.stage];
      uint64_t* full = &s.full[ring.stage];
      mbarrier_arrive_expect_tx(full, kStageBytes);
#pragma unroll
      for (int i = 0; i < kTiles / kCluster; ++i) {
        const int tile = rank * (kTiles / kCluster) + i;
        tma_load_5d_multicast(stage + kBytesA + tile * kBytesTile, map_w, step * kDepth, at.first_word + tile, full, 3,
                              kEvictLast);
      }
      tma_load_3d(stage, map_x, step * kDepth, tokens.sequence, tokens.position, full, kEvictNormal);
      ring.advance();
    }
  }
}

__device__ __forceinline__ void multiply(float (&acc)[128], Shared& s, RingState<kStages>& ring, int steps, int group,
                                         int lane) {
  int previous = -1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    mbarrier_wait(&s.full[ring.stage], ring.parity);
    const uint32_t stage = smem_addr(s.stage[ring.stage]);
    const uint64_t a = wgmma_descriptor_k_major(stage + group * (kBytesA / 2));
    const uint64_t b = wgmma_descriptor_k_major(stage + kBytesA);
    wgmma_fence_operand(acc);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      Wgmma<kTile * kTiles>::run(acc, wgmma_descriptor_advance(a, k * 32), wgmma_descriptor_advance(b, k * 32),
                                 step > 0 || k > 0);
    }
    wgmma_commit();
    wgmma_fence_operand(acc);
    if (previous >= 0) {
      wgmma_wait<1>();
      if (lane < kCluster) mbarrier_arrive_remote(&s.empty[previous], lane);
    }
    previous = ring.stage;
    ring.advance();
  }
  wgmma_wait<0>();
  wgmma_fence_operand(acc);
  if (lane < kCluster) mbarrier_arrive_remote(&s.empty[previous], lane);
}

__device__ __forceinline__ void consume(const Args& p, Shared& s, int cluster, int clusters, int places) {
  const int group = warp_uniform(threadIdx.x / 128) - 1;  // which 64 tokens of the tile
  const int lane = threadIdx.x % 32;
  const int row = group * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;  // the thread's second row is row + 8
  const uint32_t offset = swizzle128(row, 2 * (lane & 3));              // of the first of two chunks; the second's is ^ 16
  RingState<kStages> ring;
  uint32_t parity = 0;
  float acc[128];
  for (int index = cluster; index < places; index += clusters) {
    multiply(acc, s, ring, p.steps, group, lane);
    mbarrier_wait(&s.result_empty, parity ^ 1);
    parity ^= 1;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t value[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float* c = acc + 32 * tile + 4 * i + 2 * half;
          value[i] = pack_relu_bf16(c[0], c[1]);
        }
        uint8_t* to = s.result[tile] + half * 1024;
        *reinterpret_cast<uint4*>(to + offset) = make_uint4(value[0], value[1], value[2], value[3]);
        *reinterpret_cast<uint4*>(to + (offset ^ 16)) = make_uint4(value[4], value[5], value[6], value[7]);
      }
    }
    mbarrier_arrive(&s.result_full);
  }
}

// Packs kRows rows of the CTA tile, from row first_row on, and writes their mask words.
__device__ __forceinline__ void pack_rows(const Args& p, const Shared& s, uint8_t* slots, const Place& at, int first_row) {
  const int lane = threadIdx.x % 32, quad_lane = lane & 3;
  const uint32_t offset = swizzle128(first_row + lane / 4, 2 * quad_lane);
  uint8_t* own_slot = slots + lane / 4 * kSlotBytes;  // the lane's second row's is 8 slots on
  // What this lane copies out: every other 16 bytes of the slots of row lane / 2.
  const int64_t out_slot = (static_cast<int64_t>(at.token_tile) * kTokens + first_row + lane / 2) * p.words + at.first_word;
  // Of the lane's first row on, so many tokens are left.
  const int64_t tokens = p.rows.sequences * int64_t{p.rows.length} - at.token_tile * kTokens - first_row - lane / 4;
  uint32_t kept[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int word = at.first_word + tile;
    // Positions beyond H, and rows beyond M, multiply zeros, which make NaN of infinite inputs and weights.
    const int64_t rest = p.h - static_cast<int64_t>(word) * kTile - quad_lane * 16;
    const uint32_t inside = rest >= 16 ? 0xFFFFu : rest <= 0 ? 0u : (1u << rest) - 1;
    const uint8_t* values = s.result[tile] + offset;
    const uint8_t* values_high = s.result[tile] + (offset ^ 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 low = *reinterpret_cast<const uint4*>(values + half * 1024);
      const uint4 high = *reinterpret_cast<const uint4*>(values_high + half * 1024);
      const uint32_t halves[8] = {nonzero_halves(low.x),  nonzero_halves(low.y),  nonzero_halves(low.z),
                                  nonzero_halves(low.w),  nonzero_halves(high.x), nonzero_halves(high.y),
                                  nonzero_halves(high.z), nonzero_halves(high.w)};
      kept[tile][half] = half * 8 < tokens ? nonzero_bits(halves) & inside : 0;
    }
    const uint32_t counts = __popc(kept[tile][0]) | __popc(kept[tile][1]) << 16;
    const uint32_t before = quad_exclusive_sum(counts, quad_lane);
    // Element k of the lane's first row goes to slot element before + k.
    uint8_t* to0 = own_slot + (before & 0xFFFF) * 2;
    uint8_t* to1 = own_slot + 8 * kSlotBytes + (static_cast<int>(before >> 16) - static_cast<int>(counts & 0xFFFF)) * 2;
    for (uint32_t left = kept[tile][0] | kept[tile][1] << 16; left != 0; left &= left - 1, to0 += 2, to1 += 2) {
      const uint32_t element = __ffs(left) - 1;  // bits 0-15: the first row's values, 16-31: the second's
      const uint8_t* value = ((element & 8) == 0 ? values : values_high) + (element >> 4) * 1024 + (element & 7) * 2;
      *reinterpret_cast<uint16_t*>(element < 16 ? to0 : to1) = *reinterpret_cast<const uint16_t*>(value);
    }
    // A row's total stands in its quad's last lane.
    const uint32_t totals = __shfl_sync(0xFFFFFFFFu, before + counts, (lane / 2 & 7) * 4 + 3);
    const uint32_t total = lane < 16 ? totals & 0xFFFF : totals >> 16;
    __syncwarp();
    uint16_t* out = p.arena + (out_slot + tile) * kTile;
    for (uint32_t chunk = lane & 1; chunk * 8 < total; chunk += 2) {
      reinterpret_cast<uint4*>(out)[chunk] = *reinterpret_cast<const uint4*>(slots + lane / 2 * kSlotBytes + chunk * 16);
    }
    __syncwarp();
  }
  // Lane 4 r + q holds 16 bits of each word of rows r and r + 8; lane 2 r + b writes words 2 b and 2 b + 1 of row r.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    *reinterpret_cast<uint2*>(slots + (lane / 4 + half * 8) * 32 + quad_lane * 8) =
        make_uint2(kept[0][half] | kept[1][half] << 16, kept[2][half] | kept[3][half] << 16);
  }
  __syncwarp();
  const uint8_t* pieces = slots + lane / 2 * 32 + (lane & 1) * 4;
  uint32_t piece[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) piece[q] = *reinterpret_cast<const uint32_t*>(pieces + q * 8);
  __syncwarp();
  const uint32_t low[2] = {__byte_perm(piece[0], piece[1], 0x5410), __byte_perm(piece[0], piece[1], 0x7632)};
  const uint32_t high[2] = {__byte_perm(piece[2], piece[3], 0x5410), __byte_perm(piece[2], piece[3], 0x7632)};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int tile = 2 * (lane & 1) + i;
    if (at.first_word + tile < p.words) *reinterpret_cast<uint2*>(p.mask + out_slot + tile) = make_uint2(low[i], high[i]);
  }
}

__device__ __forceinline__ void finish(const Args& p, Shared& s, uint32_t rank, int cluster, int clusters, int places) {
  const int warp = threadIdx.x / 32 - 1;
  uint32_t parity = 0;
  for (int index = cluster; index < places; index += clusters) {
    const Place at = place(index, p, rank);
    mbarrier_wait(&s.result_full, parity);
    parity ^= 1;
    if (at.token_tile < p.token_tiles) {
      for (int row = warp * kRows; row < kTokens; row += kEpilogueWarps * kRows) pack_rows(p, s, s.slots[warp], at, row);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&s.result_empty);
  }
}

__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)
    gate_kernel(const Args p, const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w) {
  if (p.run_if != nullptr && *p.run_if == 0) return;
  extern __shared__ __align__(1024) uint8_t raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {
    tma_prefetch_descriptor(&map_x);
    tma_prefetch_descriptor(&map_w);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], 8 * kCluster);
    }
    mbarrier_init(&s.result_full, 256);
    mbarrier_init(&s.result_empty, kEpilogueWarps);
    fence_mbarrier_init();
  }
  cluster_sync();
  const uint32_t rank = cluster_cta_rank();
  const int cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
  const int places = (p.token_tiles + kCluster - 1) / kCluster * ((p.words + kTiles - 1) / kTiles);
  if (threadIdx.x < 128) {
    setmaxnreg_decrease<152>();
    if (threadIdx.x >= 32) {
      finish(p, s, rank, cluster, clusters, places);
    } else if (threadIdx.x == 0) {
      produce(p, &map_x, &map_w, s, rank, cluster, clusters, places);
    }
  } else {
    setmaxnreg_increase<176>();
    consume(p, s, cluster, clusters, places);
  }
  cluster_sync();  // nobody leaves while the other CTA may still write or signal here
}

// copy[p, :] = weight[order[p], :], zero for p >= h. One warp a row, 16 bytes a lane.
__global__ void __launch_bounds__(256)
    order_rows_kernel(const uint4* weight, const int32_t* order, uint4* copy, int64_t h, int64_t rows, int64_t chunks,
                      const int32_t* run_if) {
  if (run_if != nullptr && *run_if == 0) return;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (row >= rows) return;
  const uint4* from = row < h ? weight + (order == nullptr ? row : order[row]) * chunks : nullptr;
#pragma unroll 8
  for (int64_t i = threadIdx.x % 32; i < chunks; i += 32) {
    copy[row * chunks + i] = from == nullptr ? make_uint4(0, 0, 0, 0) : __ldg(from + i);
  }
}

}  // namespace

size_t gate_workspace_bytes(int64_t h, int64_t d, bool has_order) {
  const int64_t rows = (h + kTile - 1) / kTile * kTile;
  return has_order || rows != h ? static_cast<size_t>(rows * d * 2) : 0;
}

cudaError_t launch_gate(const GateParams& p, cudaStream_t stream) {
  if (p.m == 0) return cudaSuccess;
  if (p.h <= 0 || p.d <= 0 || p.d % 8 != 0 || p.sm_count < kCluster) return cudaErrorInvalidValue;
  if (!valid_sequences(p.m, p.sequences)) return cudaErrorInvalidValue;
  for (const void* pointer : {p.x, p.weight, static_cast<const void*>(p.workspace)}) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return cudaErrorInvalidValue;
  }
  Args args;
  args.mask = p.mask;
  args.arena = static_cast<uint16_t*>(p.arena);
  args.run_if = p.run_if;
  args.h = p.h;
  args.rows = make_token_rows(p.m, p.sequences);
  args.words = static_cast<int>((p.h + kTile - 1) / kTile);
  args.token_tiles = static_cast<int>((p.m + kTokens - 1) / kTokens);
  args.steps = static_cast<int>((p.d + kDepth - 1) / kDepth);

  const void* weight = p.weight;
  if (gate_workspace_bytes(p.h, p.d, p.order != nullptr) != 0) {
    if (p.workspace == nullptr) return cudaErrorInvalidValue;
    const int64_t rows = static_cast<int64_t>(args.words) * kTile;
    order_rows_kernel<<<static_cast<unsigned>((rows + 7) / 8), 256, 0, stream>>>(
        static_cast<const uint4*>(p.weight), p.order, static_cast<uint4*>(p.workspace), p.h, rows, p.d / 8, p.run_if);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    weight = p.workspace;
  }

  CUtensorMap map_x, map_w;
  cudaError_t error = make_sequences_map(&map_x, p.x, args.rows.length, p.sequences, p.d, kTokens);
  if (error != cudaSuccess) return error;
  // Row 64 w + 16 q + 2 i + e of the weight as dimensions (e, q, i, w): a box holds e fastest, then q, then i.
  const uint64_t row_bytes = static_cast<uint64_t>(p.d) * 2;
  const uint64_t dims[5] = {static_cast<uint64_t>(p.d), 2, 4, 8, static_cast<uint64_t>(args.words)};
  const uint64_t strides[4] = {row_bytes, 16 * row_bytes, 2 * row_bytes, kTile * row_bytes};
  const uint32_t box[5] = {kDepth, 2, 4, 8, 1};
  error = make_tensor_map(&map_w, weight, 5, dims, strides, box);
  if (error != cudaSuccess) return error;

  error = cudaFuncSetAttribute(gate_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  const int places = (args.token_tiles + kCluster - 1) / kCluster * ((args.words + kTiles - 1) / kTiles);
  const int clusters = places < p.sm_count / kCluster ? places : p.sm_count / kCluster;
  gate_kernel<<<clusters * kCluster, kThreads, kSharedBytes, stream>>>(args, map_x, map_w);
  return cudaGetLastError();
}

}  // namespace megasparse
