// Tokens times gathered weight rows: acc[128 tokens, 192 union columns] = A_tile . W[idx]^T, epilogues of `up` and `dh`.
//
// Work: FLOPs = 2 * 128 * D * sum over token tiles of U, U = columns of a tile's union (padded to 64 in the last block of a
// tile). Bound: the tensor cores, at U = union_share * H: union_share of the dense product. Bytes into the SMs per unit
// of 128 x 192: (128 + 192) * D * 2, i.e. 77 FLOP a byte; the epilogue moves 4 (up) or 8 (dh) bytes for each of the 128 U
// elements of a tile's compact buffers.
// Measured on one H200, M 16384, D 2048, H 5632, against the FLOP rate of cuBLAS on the dense product (776 TFLOP/s), recorded
// patterns with U = 1478 / 411 / 1678 / 3740: up 0.164 / 0.071 / 0.182 / 0.392 ms = 78 / 50 / 79 / 82 %, dh 0.195 / 0.080 /
// 0.218 / 0.499 ms = 65 / 44 / 66 / 65 %. In dh the multiplying warps wait for the gather while the epilogue is busy.
//
// One persistent CTA per SM takes units (token tile, up to three 64-column blocks) from a plan, widest first. Warpgroup 0
// fills a ring of 40-KB stages: A by TMA, the gathered rows 16 bytes a thread by cp.async, both in the 128-byte swizzle
// and on one mbarrier. Warpgroups 1 and 2 multiply 64 tokens each and leave bf16 results in shared memory. Warpgroup 3
// runs the epilogue from there while the next unit is multiplied. Without a gate nothing multiplies dh before it is rounded:
// its L1 gradient, often less than half an ulp of dh, is therefore added to the accumulators (kDhPlain).
//
// Union column j of a block goes to row n(j) of B's 64-row tile, n(16 q + 2 i + e) = 8 i + 2 q + e: then lane q of a quad
// holds the 16 consecutive columns 16 q .. 16 q + 15 of its two accumulator rows, i.e. two whole 16-byte chunks of a
// compact block, and in the epilogue the packed values of a row are runs over a quad's lanes.

#include "megasparse/gather_nt.h"

#include "gather_nt_unit.h"
#include "hopper/bf16.cuh"
#include "hopper/copy.cuh"
#include "hopper/mbarrier.cuh"
#include "hopper/tensor_map.h"
#include "hopper/wgmma.cuh"
#include "token_rows.h"

namespace megasparse {
namespace {

using namespace hopper;

constexpr int kTokens = kUnitTokens, kBlock = kUnitBlock, kMaxBlocks = kUnitMaxBlocks;
constexpr int kDepth = 64;    // elements of D per stage
constexpr int kStages = 4;
constexpr int kThreads = 512;
constexpr int kBytesA = kTokens * kDepth * 2;
constexpr int kBytesB = kBlock * kMaxBlocks * kDepth * 2;
constexpr int kStageBytes = kBytesA + kBytesB;
constexpr int kBlockBytes = kTokens * kBlock * 2;
constexpr int kStagingBytes = 3072;  // per epilogue warp: 3 arrays x 32 bytes a lane
constexpr int kAccumulators = kBlock * kMaxBlocks / 2;

struct Shared {
  alignas(1024) uint8_t stage[kStages][kStageBytes];
  uint8_t result[kMaxBlocks][kBlockBytes];  // bf16 products, each block in the image of a compact block
  alignas(16) uint8_t staging[4][kStagingBytes];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  uint64_t result_full;
  uint64_t result_empty;
};
constexpr int kSharedBytes = sizeof(Shared);

__device__ __forceinline__ Unit load_unit(const GatherNtParams& p, int index) {
  const int4 v = __ldg(reinterpret_cast<const int4*>(p.plan + kPlanHeader) + index);
  return {v.x, v.y, v.z, v.w};
}

// ---- producer ----

constexpr int kRowsPerThread = 4 * kMaxBlocks;  // a thread fills rows thread / 8 + 16 i of B, chunk thread % 8

// Weight rows of a unit's columns. Padding columns take row 0: the epilogue drops what they give.
struct Rows {
  int row[kRowsPerThread];

  __device__ __forceinline__ void fetch_columns(const GatherNtParams& p, const Unit& unit, int64_t union_stride) {
    const int32_t* idx = p.union_idx + unit.tile * union_stride + unit.first * kBlock;
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const uint32_t n = (threadIdx.x >> 3) + 16 * i;
      row[i] = i < 4 * unit.blocks ? __ldg(idx + (n & ~63u) + 16 * ((n >> 1) & 3) + 2 * ((n >> 3) & 7) + (n & 1)) : 0;
    }
  }
  __device__ __forceinline__ void look_up(const GatherNtParams& p) {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      row[i] = max(row[i], 0);
      if (p.order != nullptr) row[i] = __ldg(p.order + row[i]);
    }
  }
};

// Loads one unit; meanwhile `rows` goes on to hold those of the next one.
template <int kBlocks>
__device__ __forceinline__ void load_tile(const GatherNtParams& p, const CUtensorMap* map_a, Shared& s,
                                          TokenRows::Place tokens, Rows& rows, const Unit& next, int64_t union_stride,
                                          RingState<kStages>& ring) {
  constexpr int kUnroll = 4;  // steps that share the source addresses
  const int thread = threadIdx.x;
  const uint32_t chunk = thread & 7;
  const int64_t row_bytes = p.d * 2;
  const char* source[4 * kBlocks];
#pragma unroll
  for (int i = 0; i < 4 * kBlocks; ++i) source[i] = static_cast<const char*>(p.weight) + rows.row[i] * row_bytes + chunk * 16;
  if (next.blocks > 0) rows.fetch_columns(p, next, union_stride);

  const uint32_t destination = swizzle128(thread >> 3, chunk) + kBytesA;  // rows 16 apart have the same low three bits
  const auto begin_stage = [&](int step) {
    mbarrier_wait(&s.empty[ring.stage], ring.parity ^ 1);
    if (thread == 0) {
      mbarrier_arrive_expect_tx(&s.full[ring.stage], kBytesA);
      tma_load_3d(s.stage[ring.stage], map_a, step * kDepth, tokens.sequence, tokens.position, &s.full[ring.stage],
                  kEvictNormal);
    }
    return smem_addr(s.stage[ring.stage]) + destination;
  };
  const int full_steps = static_cast<int>(p.d / kDepth);
#pragma unroll 1
  for (int first = 0; first < full_steps; first += kUnroll) {
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (first + k < full_steps) {
        const uint32_t smem = begin_stage(first + k);
#pragma unroll
        for (int i = 0; i < 4 * kBlocks; ++i) cp_async_16(smem + i * 16 * 128, source[i] + k * kDepth * 2);
        mbarrier_arrive_cp_async(&s.full[ring.stage]);
        ring.advance();
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) source[i] += kUnroll * kDepth * 2;
    if (first == 0 && next.blocks > 0) rows.look_up(p);
  }
  if (full_steps == 0 && next.blocks > 0) rows.look_up(p);
  if (p.d % kDepth != 0) {
    const uint32_t smem = begin_stage(full_steps);
    const int back = ((full_steps + kUnroll - 1) / kUnroll * kUnroll - full_steps) * kDepth * 2;
    const bool inside = full_steps * kDepth + static_cast<int>(chunk) * 8 < p.d;
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) {
      cp_async_16(smem + i * 16 * 128, inside ? source[i] - back : p.weight, inside);
    }
    mbarrier_arrive_cp_async(&s.full[ring.stage]);
    ring.advance();
  }
}

__device__ __forceinline__ void produce(const GatherNtParams& p, const TokenRows& token_rows, const CUtensorMap* map_a,
                                        Shared& s) {
  const int64_t union_stride = (p.h + kBlock - 1) / kBlock * kBlock;
  const int units = p.plan[0], stride = gridDim.x;
  int index = blockIdx.x;
  if (index >= units) return;
  RingState<kStages> ring;
  Rows rows;
  Unit unit = load_unit(p, index);
  Unit next = index + stride < units ? load_unit(p, index + stride) : Unit{};
  rows.fetch_columns(p, unit, union_stride);
  rows.look_up(p);
  while (true) {
    const TokenRows::Place tokens = token_rows.place(unit.tile * kTokens);
    switch (unit.blocks) {
      case 3: load_tile<3>(p, map_a, s, tokens, rows, next, union_stride, ring); break;
      case 2: load_tile<2>(p, map_a, s, tokens, rows, next, union_stride, ring); break;
      default: load_tile<1>(p, map_a, s, tokens, rows, next, union_stride, ring); break;
    }
    index += stride;
    if (index >= units) return;
    unit = next;
    next = index + stride < units ? load_unit(p, index + stride) : Unit{};
  }
}

// ---- consumers ----

template <int kBlocks>
__device__ __forceinline__ void multiply(float (&acc)[kAccumulators], Shared& s, RingState<kStages>& ring, int steps, int group,
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

template <GatherNtMode kMode>
__device__ __forceinline__ void consume(const GatherNtParams& p, Shared& s) {
  constexpr bool kAddsL1 = kMode == GatherNtMode::kDhPlain;  // active is positive there: the sign is 1
  const int group = warp_uniform(threadIdx.x / 128) - 1;  // which 64 tokens of the tile
  const int lane = threadIdx.x % 32, quad_lane = lane & 3;
  const int row = group * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;  // of the tile; the thread's second row is row + 8
  const uint32_t offset = swizzle128(row, 2 * quad_lane);               // of the first of two chunks; the second's ^ 16
  const int steps = static_cast<int>((p.d + kDepth - 1) / kDepth);
  const int units = p.plan[0];
  const bool signals = lane == 0;
  const float l1_grad = kAddsL1 && p.l1_grad != nullptr ? *p.l1_grad : 0.f;
  RingState<kStages> ring;
  uint32_t parity = 0;
  float acc[kAccumulators];
  for (int index = blockIdx.x; index < units; index += gridDim.x) {
    const Unit unit = load_unit(p, index);
    const int blocks = unit.blocks;
    uint32_t counted[2];  // of the thread's rows; bytes as they are, for which only a comparison after the product waits
    if (kAddsL1) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t token = static_cast<int64_t>(unit.tile) * kTokens + row + 8 * half;
        counted[half] = token >= p.m ? 0 : p.token_mask == nullptr ? 1 : __ldg(p.token_mask + token);
      }
    }
    switch (blocks) {
      case 3: multiply<3>(acc, s, ring, steps, group, signals); break;
      case 2: multiply<2>(acc, s, ring, steps, group, signals); break;
      default: multiply<1>(acc, s, ring, steps, group, signals); break;
    }
    mbarrier_wait(&s.result_empty, parity ^ 1);
    parity ^= 1;
#pragma unroll
    for (int block = 0; block < kMaxBlocks; ++block) {
      if (block < blocks) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float l1 = kAddsL1 && counted[half] != 0 ? l1_grad : 0.f;
          uint32_t word[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const float* c = acc + 32 * block + 4 * i + 2 * half;
            word[i] = kAddsL1 ? pack_bf16(c[0] + l1, c[1] + l1) : pack_bf16(c[0], c[1]);
          }
          uint8_t* to = s.result[block] + half * 1024;
          *reinterpret_cast<uint4*>(to + offset) = make_uint4(word[0], word[1], word[2], word[3]);
          *reinterpret_cast<uint4*>(to + (offset ^ 16)) = make_uint4(word[4], word[5], word[6], word[7]);
        }
      }
    }
    mbarrier_arrive(&s.result_full);
  }
}

// ---- epilogue ----

// 16 columns of a row: two 16-byte chunks of a compact block, the second at the first's offset ^ 16.
struct Chunks {
  uint32_t word[8];
};
__device__ __forceinline__ Chunks make_chunks(const uint4& low, const uint4& high) {
  return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}
__device__ __forceinline__ Chunks load_chunks(const void* compact, int64_t offset) {
  const char* base = static_cast<const char*>(compact);
  return make_chunks(__ldcg(reinterpret_cast<const uint4*>(base + offset)),
                     __ldcg(reinterpret_cast<const uint4*>(base + (offset ^ 16))));
}
__device__ __forceinline__ void store_chunks(void* compact, int64_t offset, const uint32_t (&word)[8]) {
  char* base = static_cast<char*>(compact);
  *reinterpret_cast<uint4*>(base + offset) = make_uint4(word[0], word[1], word[2], word[3]);
  *reinterpret_cast<uint4*>(base + (offset ^ 16)) = make_uint4(word[4], word[5], word[6], word[7]);
}

// A lane's 16 values in private staging: elements 8 c .. 8 c + 7 at c * 512 (16 bytes a lane).
__device__ __forceinline__ void stage_words(uint8_t* staging, const uint32_t (&word)[8]) {
  *reinterpret_cast<uint4*>(staging) = make_uint4(word[0], word[1], word[2], word[3]);
  *reinterpret_cast<uint4*>(staging + 512) = make_uint4(word[4], word[5], word[6], word[7]);
}
__device__ __forceinline__ uint16_t staged(const uint8_t* staging, uint32_t element) {
  return *reinterpret_cast<const uint16_t*>(staging + (element >> 3) * 512 + (element & 7) * 2);
}

// What the epilogue reads from global memory for one row of a block.
template <GatherNtMode kMode>
struct Fetched {
  Chunks g, u;
  int64_t row_ptr;
  uint32_t base;
  uint32_t counted;

  __device__ __forceinline__ void fetch(const GatherNtParams& p, int64_t compact, int64_t base_index, int64_t token) {
    g = load_chunks(p.g_compact, compact);
    if (kMode == GatherNtMode::kDh) u = load_chunks(p.u_compact, compact);
    if (kMode != GatherNtMode::kUpOnly) {
      row_ptr = __ldg(p.row_ptr + token);
      base = __ldg(p.base + base_index);
    }
    if (kMode == GatherNtMode::kUp || kMode == GatherNtMode::kDh) {
      counted = token < p.m && (p.token_mask == nullptr || __ldg(p.token_mask + token) != 0);
    }
  }
};

template <GatherNtMode kMode>
__device__ __forceinline__ void finish(const GatherNtParams& p, Shared& s) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, quad_lane = lane & 3;
  const int row = warp * 32 + lane / 4;  // of the tile; a thread's rows are row + 8 i, i < 4
  const uint32_t offset = swizzle128(row, 2 * quad_lane);
  uint8_t* staging = s.staging[warp] + lane * 16;
  const int units = p.plan[0];
  const float l1_grad = kMode == GatherNtMode::kDh && p.l1_grad != nullptr ? *p.l1_grad : 0.f;
  uint32_t parity = 0;
  for (int index = blockIdx.x; index < units; index += gridDim.x) {
    const Unit unit = load_unit(p, index);
    const int64_t token = static_cast<int64_t>(unit.tile) * kTokens + row;
    const int64_t compact = static_cast<int64_t>(unit.compact_block) * kBlockBytes + offset;
    const int64_t base = static_cast<int64_t>(unit.compact_block) * kTokens + row;
    float l1 = 0.f;
    Fetched<kMode> next;
    next.fetch(p, compact, base, token);
    mbarrier_wait(&s.result_full, parity);
    parity ^= 1;
    // Row 8 (i % 4) of block i / 4.
#pragma unroll 1
    for (int i = 0; i < unit.blocks * 4; ++i) {
      const Fetched<kMode> now = next;
      const int64_t at = compact + (i >> 2) * kBlockBytes + (i & 3) * 1024;
      if (i + 1 < unit.blocks * 4) {
        const int j = i + 1;
        next.fetch(p, compact + (j >> 2) * kBlockBytes + (j & 3) * 1024, base + (j >> 2) * kTokens + (j & 3) * 8,
                   token + (j & 3) * 8);
      }
      const uint8_t* result = s.result[i >> 2] + (i & 3) * 1024 + offset;
      const uint8_t* result_high = s.result[i >> 2] + (i & 3) * 1024 + (offset ^ 16);
      const Chunks product = make_chunks(*reinterpret_cast<const uint4*>(result), *reinterpret_cast<const uint4*>(result_high));
      uint32_t halves[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) halves[k] = nonzero_halves(now.g.word[k]);
      if (kMode == GatherNtMode::kUpOnly) {
        uint32_t up[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) up[k] = product.word[k] & halves[k];
        store_chunks(p.u_compact, at, up);
        continue;
      }
      const uint32_t bits = nonzero_bits(halves);
      const uint32_t count = __popc(bits);
      int64_t position = now.row_ptr + now.base + quad_exclusive_sum(count, quad_lane);
      if (kMode == GatherNtMode::kUp) {
        uint32_t hidden[8];
        float sum = 0.f;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          hidden[k] = mul_bf16(now.g.word[k], product.word[k]) & halves[k];
          sum += fabsf(bf16_first(hidden[k])) + fabsf(bf16_second(hidden[k]));
        }
        store_chunks(p.g_compact, at, hidden);
        if (now.counted) l1 += sum;
        for (uint32_t left = bits; left != 0; left &= left - 1, ++position) {
          const uint32_t element = __ffs(left) - 1;
          const uint16_t value = *reinterpret_cast<const uint16_t*>((element < 8 ? result : result_high) + (element & 7) * 2);
          if (position < p.capacity) static_cast<uint16_t*>(p.u_packed)[position] = value;
        }
      } else {
        const float scale = kMode == GatherNtMode::kDh && now.counted ? l1_grad : 0.f;
        uint32_t first[8], second[8], hidden[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const uint32_t gate = now.g.word[k];
          if (kMode == GatherNtMode::kDh) {
            const float dh0 = bf16_first(product.word[k]), dh1 = bf16_second(product.word[k]);
            const uint32_t up = now.u.word[k];
            hidden[k] = mul_bf16(gate, up);
            const uint32_t sign = sign_bf16(hidden[k]);
            const float total0 = fmaf(scale, bf16_first(sign), dh0), total1 = fmaf(scale, bf16_second(sign), dh1);
            first[k] = pack_bf16(total0 * bf16_first(up), total1 * bf16_second(up)) & halves[k];
            second[k] = pack_bf16(total0 * bf16_first(gate), total1 * bf16_second(gate)) & halves[k];
          } else {
            hidden[k] = gate;
            first[k] = product.word[k] & halves[k];
          }
        }
        store_chunks(p.g_compact, at, first);
        if (kMode == GatherNtMode::kDh) store_chunks(p.u_compact, at, second);
        stage_words(staging, first);
        if (kMode == GatherNtMode::kDh) stage_words(staging + 1024, second);
        stage_words(staging + 2048, hidden);
        uint16_t* first_packed = static_cast<uint16_t*>(kMode == GatherNtMode::kDh ? p.dg_packed : p.du_packed);
        for (uint32_t left = bits; left != 0; left &= left - 1, ++position) {
          const uint32_t element = __ffs(left) - 1;
          if (position < p.capacity) {
            first_packed[position] = staged(staging, element);
            if (kMode == GatherNtMode::kDh) static_cast<uint16_t*>(p.du_packed)[position] = staged(staging + 1024, element);
            if (p.h_packed != nullptr) static_cast<uint16_t*>(p.h_packed)[position] = staged(staging + 2048, element);
          }
        }
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&s.result_empty);
    if (kMode == GatherNtMode::kUp) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) l1 += __shfl_xor_sync(0xFFFFFFFFu, l1, step);
      if (lane == 0) p.l1_partial[static_cast<int64_t>(index) * kGatherNtPartials + warp] = l1;
    }
  }
}

template <GatherNtMode kMode>
__global__ void __launch_bounds__(kThreads, 1)
    gather_nt_kernel(const __grid_constant__ GatherNtParams p, const __grid_constant__ TokenRows token_rows,
                     const __grid_constant__ CUtensorMap map_a) {
  if (p.run_if != nullptr && *p.run_if == 0) return;
  extern __shared__ __align__(1024) uint8_t raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {
    tma_prefetch_descriptor(&map_a);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&s.full[i], 128 + 1);
      mbarrier_init(&s.empty[i], 8);
    }
    mbarrier_init(&s.result_full, 256);
    mbarrier_init(&s.result_empty, 4);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_decrease<80>();
    produce(p, token_rows, &map_a, s);
  } else if (threadIdx.x < 384) {
    setmaxnreg_increase<152>();
    consume<kMode>(p, s);
  } else {
    setmaxnreg_decrease<112>();
    finish<kMode>(p, s);
  }
}

template <GatherNtMode kMode>
cudaError_t launch(const GatherNtParams& p, const CUtensorMap& map_a, int grid, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(gather_nt_kernel<kMode>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  gather_nt_kernel<kMode><<<grid, kThreads, kSharedBytes, stream>>>(p, make_token_rows(p.m, p.sequences), map_a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_gather_nt(const GatherNtParams& p, cudaStream_t stream) {
  if (p.m == 0) return cudaSuccess;
  if (p.h <= 0 || p.d <= 0 || p.d % 8 != 0 || p.sm_count <= 0) return cudaErrorInvalidValue;
  if (!valid_sequences(p.m, p.sequences)) return cudaErrorInvalidValue;
  if (reinterpret_cast<uintptr_t>(p.a) % 16 != 0 || reinterpret_cast<uintptr_t>(p.weight) % 16 != 0) return cudaErrorInvalidValue;
  CUtensorMap map_a;
  const cudaError_t error = make_sequences_map(&map_a, p.a, p.m / p.sequences, p.sequences, p.d, kTokens);
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
