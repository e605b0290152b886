// Tokens times gathered weight rows: acc[128 tokens, 256 union columns] = A_tile . W[idx]^T, epilogues of `up` and `dh`.
//
// Work: FLOPs = 2 * 128 * D * sum over token tiles of U, U = columns of a tile's union (padded to 64 in the last block of a
// tile). Bound: the tensor cores, at U = union_share * H: union_share of the dense product. Bytes into the SMs per unit
// of 128 x 256: (128 + 256) * D * 2, i.e. 85 FLOP a byte.
//
// One persistent CTA per SM takes units (token tile, up to four 64-column blocks) from a plan, widest first. Warpgroup 0
// fills a ring of 48-KB stages: A by TMA, the gathered rows 16 bytes a thread by cp.async, both in the 128-byte swizzle
// and on one mbarrier. Warpgroups 1 and 2 multiply 64 tokens each and run the epilogue from registers.
//
// Union column j of a block goes to row n(j) of B's 64-row tile, n(16 q + 2 i + e) = 8 i + 2 q + e: then lane q of a quad
// holds the 16 consecutive columns 16 q .. 16 q + 15 of its two accumulator rows, i.e. two whole 16-byte chunks of a
// compact block, which it reads and writes directly, and packed values of a row are runs over the quad's lanes.

#include "megasparse/gather_nt.h"

#include "hopper/bf16.cuh"
#include "hopper/copy.cuh"
#include "hopper/mbarrier.cuh"
#include "hopper/tensor_map.h"
#include "hopper/wgmma.cuh"

namespace megasparse {
namespace {

using namespace hopper;

constexpr int kTokens = 128;  // per tile
constexpr int kBlock = 64;    // union columns of a compact block
constexpr int kMaxBlocks = 4; // blocks of a unit
constexpr int kDepth = 64;    // elements of D per stage
constexpr int kStages = 4;
constexpr int kThreads = 384;
constexpr int kBytesA = kTokens * kDepth * 2;
constexpr int kBytesB = kBlock * kMaxBlocks * kDepth * 2;
constexpr int kStageBytes = kBytesA + kBytesB;
constexpr int kStagingBytes = 4096;  // per consumer warp
constexpr int kBlockBytes = kTokens * kBlock * 2;
constexpr int kPlanHeader = 4;  // int32 words before the units

struct Shared {
  alignas(1024) uint8_t stage[kStages][kStageBytes];
  alignas(16) uint8_t staging[8][kStagingBytes];
  uint64_t full[kStages];
  uint64_t empty[kStages];
};
constexpr int kSharedBytes = sizeof(Shared) + 1024;  // room to align

struct Unit {
  int tile;
  int first;          // first block within the tile
  int blocks;         // 1..4
  int compact_block;  // index of the first block in the compact buffers
};
static_assert(sizeof(Unit) == 16);

__device__ __forceinline__ Unit load_unit(const GatherNtParams& p, int index) {
  const int4 v = __ldg(reinterpret_cast<const int4*>(p.plan + kPlanHeader) + index);
  return {v.x, v.y, v.z, v.w};
}

// ---- producer ----

template <int kBlocks>
__device__ __forceinline__ void load_tile(const GatherNtParams& p, const CUtensorMap* map_a, Shared& s, const Unit& unit,
                                          RingState<kStages>& ring, int64_t union_stride) {
  const int thread = threadIdx.x;
  const uint32_t chunk = thread & 7;
  const uint32_t slot = thread >> 3;  // this thread fills rows slot + 16 i of B
  const int32_t* idx = p.union_idx + unit.tile * union_stride + unit.first * kBlock;
  uint32_t offset[4 * kBlocks];  // bytes from the weight's start
  uint32_t present = 0;          // bit i: row slot + 16 i is no padding
  const uint32_t row_bytes = static_cast<uint32_t>(p.d) * 2;
#pragma unroll
  for (int i = 0; i < 4 * kBlocks; ++i) {
    const uint32_t n = slot + 16 * i;
    int row = __ldg(idx + (n & ~63u) + 16 * ((n >> 1) & 3) + 2 * ((n >> 3) & 7) + (n & 1));
    if (row >= 0) {
      present |= 1u << i;
      if (p.order != nullptr) row = __ldg(p.order + row);
    }
    offset[i] = max(row, 0) * row_bytes + chunk * 16;
  }
  const uint32_t destination = swizzle128(slot, chunk) + kBytesA;  // slot + 16 i has the same low three bits
  const char* source = static_cast<const char*>(p.weight);
  const int steps = static_cast<int>((p.d + kDepth - 1) / kDepth);
  for (int step = 0; step < steps; ++step) {
    mbarrier_wait(&s.empty[ring.stage], ring.parity ^ 1);
    uint8_t* stage = s.stage[ring.stage];
    uint64_t* full = &s.full[ring.stage];
    if (thread == 0) {
      mbarrier_arrive_expect_tx(full, kBytesA);
      tma_load_2d(stage, map_a, step * kDepth, unit.tile * kTokens, full, kEvictNormal);
    }
    // Beyond D the copy writes zeros and reads nothing.
    const bool inside = step * kDepth + static_cast<int>(chunk) * 8 < p.d;
    const uint32_t valid = inside ? present : 0;
    const uint32_t smem = smem_addr(stage) + destination;
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) {
      cp_async_16(smem + i * 16 * 128, source + offset[i], valid >> i & 1);
    }
    mbarrier_arrive_cp_async(full);
    source += kDepth * 2;
    ring.advance();
  }
}

// ---- consumers ----

template <int kBlocks>
__device__ __forceinline__ void multiply(float (&acc)[128], Shared& s, RingState<kStages>& ring, int steps, int group,
                                         bool signals) {
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
      Wgmma<kBlock * kBlocks>::run(acc, wgmma_descriptor_advance(a, k * 32), wgmma_descriptor_advance(b, k * 32),
                                   step > 0 || k > 0);
    }
    wgmma_commit();
    wgmma_fence_operand(acc);
    if (previous >= 0) {
      wgmma_wait<1>();
      if (signals) mbarrier_arrive(&s.empty[previous]);
    }
    previous = ring.stage;
    ring.advance();
  }
  wgmma_wait<0>();
  wgmma_fence_operand(acc);
  if (signals) mbarrier_arrive(&s.empty[previous]);
}

// The two 16-byte chunks of a compact-block row that a thread owns.
struct Chunks {
  uint32_t word[8];
};
__device__ __forceinline__ Chunks load_chunks(const void* compact, int64_t offset) {
  const char* at = static_cast<const char*>(compact) + offset;
  const char* other = static_cast<const char*>(compact) + (offset ^ 16);
  const int4 low = __ldcg(reinterpret_cast<const int4*>(at)), high = __ldcg(reinterpret_cast<const int4*>(other));
  return {{static_cast<uint32_t>(low.x), static_cast<uint32_t>(low.y), static_cast<uint32_t>(low.z),
           static_cast<uint32_t>(low.w), static_cast<uint32_t>(high.x), static_cast<uint32_t>(high.y),
           static_cast<uint32_t>(high.z), static_cast<uint32_t>(high.w)}};
}
__device__ __forceinline__ void store_chunks(void* compact, int64_t offset, const uint32_t (&word)[8]) {
  char* at = static_cast<char*>(compact) + offset;
  char* other = static_cast<char*>(compact) + (offset ^ 16);
  *reinterpret_cast<uint4*>(at) = make_uint4(word[0], word[1], word[2], word[3]);
  *reinterpret_cast<uint4*>(other) = make_uint4(word[4], word[5], word[6], word[7]);
}
// A thread's private staging, 16 bytes a lane: element e (0..15) of array `slot` at stage_offset(slot, e).
__device__ __forceinline__ uint32_t stage_offset(uint32_t slot, uint32_t element) {
  return (slot * 2 + (element >> 3)) * 512 + (element & 7) * 2;
}
__device__ __forceinline__ void stage_words(uint8_t* staging, uint32_t slot, const uint32_t (&word)[8]) {
  *reinterpret_cast<uint4*>(staging + stage_offset(slot, 0)) = make_uint4(word[0], word[1], word[2], word[3]);
  *reinterpret_cast<uint4*>(staging + stage_offset(slot, 8)) = make_uint4(word[4], word[5], word[6], word[7]);
}
__device__ __forceinline__ uint16_t staged(const uint8_t* staging, uint32_t slot, uint32_t element) {
  return *reinterpret_cast<const uint16_t*>(staging + stage_offset(slot, element));
}

template <GatherNtMode kMode>
__device__ __forceinline__ void consume(const GatherNtParams& p, Shared& s) {
  const int group = warp_uniform(threadIdx.x / 128) - 1;  // which 64 tokens of the tile
  const int warp = (threadIdx.x % 128) / 32, lane = threadIdx.x % 32, quad_lane = lane & 3;
  const int row = group * 64 + warp * 16 + lane / 4;  // of the tile; the thread's second row is row + 8
  // Byte offset in a compact block of the first of the thread's two chunks; the second is at ^ 16.
  const uint32_t chunk_offset = swizzle128(row, 2 * quad_lane);
  uint8_t* staging = s.staging[group * 4 + warp] + lane * 16;
  const int steps = static_cast<int>((p.d + kDepth - 1) / kDepth);
  const int units = p.plan[0];
  const float l1_grad = (kMode == GatherNtMode::kDh || kMode == GatherNtMode::kDhPlain) && p.l1_grad != nullptr ? *p.l1_grad : 0.f;
  RingState<kStages> ring;
  float acc[128];

  Unit unit{};
  if (static_cast<int>(blockIdx.x) < units) unit = load_unit(p, blockIdx.x);
  for (int index = blockIdx.x; index < units; index += gridDim.x) {
    Unit next{};
    if (index + static_cast<int>(gridDim.x) < units) next = load_unit(p, index + gridDim.x);

    // What the epilogue reads first is under way during the products.
    const int64_t token = static_cast<int64_t>(unit.tile) * kTokens + row;
    int64_t compact = static_cast<int64_t>(unit.compact_block) * kBlockBytes + chunk_offset;
    const uint16_t* base = p.base + static_cast<int64_t>(unit.compact_block) * kTokens + row;
    Chunks g[2], u[2];
    int64_t packed[2];
    bool counted[2];
    uint32_t row_base[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      g[half] = load_chunks(p.g_compact, compact + half * 1024);
      if (kMode == GatherNtMode::kDh && half == 0) u[half] = load_chunks(p.u_compact, compact);
      if (kMode != GatherNtMode::kUpOnly) {
        const int64_t t = token + half * 8;
        packed[half] = __ldg(p.row_ptr + t);
        row_base[half] = __ldg(base + half * 8);
        counted[half] = t < p.m && (p.token_mask == nullptr || __ldg(p.token_mask + t) != 0);
      }
    }

    const bool signals = lane == 0;
    switch (unit.blocks) {
      case 4: multiply<4>(acc, s, ring, steps, group, signals); break;
      case 3: multiply<3>(acc, s, ring, steps, group, signals); break;
      case 2: multiply<2>(acc, s, ring, steps, group, signals); break;
      default: multiply<1>(acc, s, ring, steps, group, signals); break;
    }

    if (kMode == GatherNtMode::kDh) u[1] = load_chunks(p.u_compact, compact + 1024);
    float l1 = 0.f;
#pragma unroll
    for (int block = 0; block < kMaxBlocks; ++block) {
      if (block < unit.blocks) {
        const bool more = block + 1 < unit.blocks;
        uint32_t bits[2], start[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t halves[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) halves[i] = nonzero_halves(g[half].word[i]);
          bits[half] = nonzero_bits(halves);
          if (kMode == GatherNtMode::kUpOnly) {
            uint32_t value[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const float* c = acc + 32 * block + 4 * i + 2 * half;
              value[i] = pack_bf16(c[0], c[1]) & halves[i];
            }
            store_chunks(p.u_compact, compact + half * 1024, value);
          }
        }
        if (kMode != GatherNtMode::kUpOnly) {
          const uint32_t counts = __popc(bits[0]) | __popc(bits[1]) << 16;
          const uint32_t before = quad_exclusive_sum(counts, quad_lane);
          start[0] = row_base[0] + (before & 0xFFFF);
          start[1] = row_base[1] + (before >> 16);
        }

        if (kMode == GatherNtMode::kUp) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t up[8], hidden[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const float* c = acc + 32 * block + 4 * i + 2 * half;
              up[i] = pack_bf16(c[0], c[1]);
              hidden[i] = mul_bf16(g[half].word[i], up[i]);
            }
            store_chunks(p.g_compact, compact + half * 1024, hidden);
            stage_words(staging, half, up);
            stage_words(staging, 2 + half, hidden);
          }
        } else if (kMode == GatherNtMode::kDh || kMode == GatherNtMode::kDhPlain) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float scale = counted[half] ? l1_grad : 0.f;
            uint32_t first[8], second[8], hidden[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const float* c = acc + 32 * block + 4 * i + 2 * half;
              const uint32_t gate = g[half].word[i];
              if (kMode == GatherNtMode::kDh) {
                const uint32_t up = u[half].word[i];
                hidden[i] = mul_bf16(gate, up);
                const uint32_t sign = sign_bf16(hidden[i]);
                const float dh0 = fmaf(scale, bf16_first(sign), c[0]), dh1 = fmaf(scale, bf16_second(sign), c[1]);
                first[i] = pack_bf16(dh0 * bf16_first(up), dh1 * bf16_second(up));
                second[i] = pack_bf16(dh0 * bf16_first(gate), dh1 * bf16_second(gate));
              } else {
                hidden[i] = gate;
                first[i] = pack_bf16(c[0] + scale, c[1] + scale) & nonzero_halves(gate);
              }
            }
            store_chunks(p.g_compact, compact + half * 1024, first);
            if (kMode == GatherNtMode::kDh) store_chunks(p.u_compact, compact + half * 1024, second);
            stage_words(staging, 0, first);
            stage_words(staging, 1, hidden);
            if (kMode == GatherNtMode::kDh) stage_words(staging, 2, second);
            int64_t position = packed[half] + start[half];
            uint16_t* first_packed = static_cast<uint16_t*>(kMode == GatherNtMode::kDh ? p.dg_packed : p.du_packed);
            for (uint32_t left = bits[half]; left != 0; left &= left - 1, ++position) {
              const uint32_t element = __ffs(left) - 1;
              if (position < p.capacity) {
                first_packed[position] = staged(staging, 0, element);
                if (p.h_packed != nullptr) static_cast<uint16_t*>(p.h_packed)[position] = staged(staging, 1, element);
                if (kMode == GatherNtMode::kDh) static_cast<uint16_t*>(p.du_packed)[position] = staged(staging, 2, element);
              }
            }
          }
        }

        compact += kBlockBytes;
        base += kTokens;
        if (more) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            g[half] = load_chunks(p.g_compact, compact + half * 1024);
            if (kMode == GatherNtMode::kDh) u[half] = load_chunks(p.u_compact, compact + half * 1024);
            if (kMode != GatherNtMode::kUpOnly) row_base[half] = __ldg(base + half * 8);
          }
        }

        if (kMode == GatherNtMode::kUp) {
          // Bits 0-15: the first row's columns, 16-31: the second's. Position of the k-th of them: start of its row + k.
          uint32_t left = bits[0] | bits[1] << 16;
          const uint32_t add = (counted[0] ? 0x0000FFFFu : 0u) | (counted[1] ? 0xFFFF0000u : 0u);
          int64_t position0 = packed[0] + start[0];
          int64_t position1 = packed[1] + start[1] - __popc(bits[0]);
          for (; left != 0; left &= left - 1, ++position0, ++position1) {
            const uint32_t element = __ffs(left) - 1;
            const int64_t position = element < 16 ? position0 : position1;
            const uint32_t offset = (element >> 3) * 512 + (element & 7) * 2;
            const uint16_t value = *reinterpret_cast<const uint16_t*>(staging + offset);
            const uint32_t hidden = *reinterpret_cast<const uint16_t*>(staging + 2048 + offset);
            if (add >> element & 1) l1 += fabsf(__uint_as_float(hidden << 16));
            if (position < p.capacity) static_cast<uint16_t*>(p.u_packed)[position] = value;
          }
        }
      }
    }
    if (kMode == GatherNtMode::kUp) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) l1 += __shfl_xor_sync(0xFFFFFFFFu, l1, step);
      if (lane == 0) p.l1_partial[static_cast<int64_t>(index) * kGatherNtPartials + group * 4 + warp] = l1;
    }
    unit = next;
  }
}

template <GatherNtMode kMode>
__global__ void __launch_bounds__(kThreads, 1)
    gather_nt_kernel(const __grid_constant__ GatherNtParams p, const __grid_constant__ CUtensorMap map_a) {
  if (p.run_if != nullptr && *p.run_if == 0) return;
  extern __shared__ uint8_t raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw + ((1024 - (smem_addr(raw) & 1023)) & 1023));
  if (threadIdx.x == 0) {
    tma_prefetch_descriptor(&map_a);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&s.full[i], 128 + 1);
      mbarrier_init(&s.empty[i], 8);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_decrease<56>();
    const int64_t union_stride = (p.h + kBlock - 1) / kBlock * kBlock;
    const int units = p.plan[0];
    RingState<kStages> ring;
    for (int index = blockIdx.x; index < units; index += gridDim.x) {
      const Unit unit = load_unit(p, index);
      switch (unit.blocks) {
        case 4: load_tile<4>(p, &map_a, s, unit, ring, union_stride); break;
        case 3: load_tile<3>(p, &map_a, s, unit, ring, union_stride); break;
        case 2: load_tile<2>(p, &map_a, s, unit, ring, union_stride); break;
        default: load_tile<1>(p, &map_a, s, unit, ring, union_stride); break;
      }
    }
  } else {
    setmaxnreg_increase<224>();
    consume<kMode>(p, s);
  }
}

// ---- plan ----

// Units of 4 blocks, tile after tile, then each tile's remainder of 3, 2, 1 blocks. One CTA; thread t owns a run of tiles.
__global__ void __launch_bounds__(1024) plan_kernel(const int32_t* union_count, int tiles, int32_t* plan) {
  constexpr int kSums = 5;  // units of 4, 3, 2, 1 blocks; blocks
  __shared__ int warp_sums[32][kSums];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int run = (tiles + 1023) / 1024;
  const int begin = min(static_cast<int>(threadIdx.x) * run, tiles), end = min(begin + run, tiles);
  int own[kSums] = {};
  for (int tile = begin; tile < end; ++tile) {
    const int blocks = (union_count[tile] + kBlock - 1) / kBlock;
    own[0] += blocks / 4;
    for (int i = 1; i < 4; ++i) own[i] += blocks % 4 == 4 - i;
    own[4] += blocks;
  }
  int scan[kSums];
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
    for (int i = 0; i < kSums; ++i) {
      if (w < warp) scan[i] += warp_sums[w][i];
      total[i] += warp_sums[w][i];
    }
  }
  for (int i = 1, before = 0; i < 4; ++i) {
    before += total[i - 1];
    scan[i] += before;
  }
  if (threadIdx.x == 0) plan[0] = total[0] + total[1] + total[2] + total[3];
  int4* units = reinterpret_cast<int4*>(plan + kPlanHeader);
  int compact_block = scan[4];
  for (int tile = begin; tile < end; ++tile) {
    const int blocks = (union_count[tile] + kBlock - 1) / kBlock;
    for (int first = 0; first + 4 <= blocks; first += 4) units[scan[0]++] = make_int4(tile, first, 4, compact_block + first);
    const int rest = blocks % 4, first = blocks - rest;
    if (rest == 3) units[scan[1]++] = make_int4(tile, first, 3, compact_block + first);
    if (rest == 2) units[scan[2]++] = make_int4(tile, first, 2, compact_block + first);
    if (rest == 1) units[scan[3]++] = make_int4(tile, first, 1, compact_block + first);
    compact_block += blocks;
  }
}

template <GatherNtMode kMode>
cudaError_t launch(const GatherNtParams& p, const CUtensorMap& map_a, int grid, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(gather_nt_kernel<kMode>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  gather_nt_kernel<kMode><<<grid, kThreads, kSharedBytes, stream>>>(p, map_a);
  return cudaGetLastError();
}

}  // namespace

int64_t gather_nt_max_units(int64_t m, int64_t h) {
  return (m + kTokens - 1) / kTokens * ((h + kBlock * kMaxBlocks - 1) / (kBlock * kMaxBlocks));
}

size_t gather_nt_plan_bytes(int64_t m, int64_t h) { return kPlanHeader * 4 + gather_nt_max_units(m, h) * sizeof(Unit); }

cudaError_t launch_gather_nt_plan(const int32_t* union_count, int64_t m, int64_t h, int32_t* plan, cudaStream_t stream) {
  if (m < 0 || h <= 0 || plan == nullptr) return cudaErrorInvalidValue;
  plan_kernel<<<1, 1024, 0, stream>>>(union_count, static_cast<int>((m + kTokens - 1) / kTokens), plan);
  return cudaGetLastError();
}

cudaError_t launch_gather_nt(const GatherNtParams& p, cudaStream_t stream) {
  if (p.m == 0) return cudaSuccess;
  if (p.m < 0 || p.h <= 0 || p.d <= 0 || p.d % 8 != 0 || p.sm_count <= 0) return cudaErrorInvalidValue;
  if (p.h * p.d * 2 > INT64_C(0xFFFFFFFF)) return cudaErrorInvalidValue;  // 32-bit row offsets
  if (reinterpret_cast<uintptr_t>(p.a) % 16 != 0 || reinterpret_cast<uintptr_t>(p.weight) % 16 != 0) return cudaErrorInvalidValue;
  CUtensorMap map_a;
  const cudaError_t error = make_matrix_map(&map_a, p.a, p.m, p.d, kTokens);
  if (error != cudaSuccess) return error;
  const int64_t units = gather_nt_max_units(p.m, p.h);
  const int grid = static_cast<int>(units < p.sm_count ? units : p.sm_count);
  switch (p.mode) {
    case GatherNtMode::kUp: return launch<GatherNtMode::kUp>(p, map_a, grid, stream);
    case GatherNtMode::kUpOnly: return launch<GatherNtMode::kUpOnly>(p, map_a, grid, stream);
    case GatherNtMode::kDh: return launch<GatherNtMode::kDh>(p, map_a, grid, stream);
    case GatherNtMode::kDhPlain: return launch<GatherNtMode::kDhPlain>(p, map_a, grid, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace megasparse
