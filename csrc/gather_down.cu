// down: y = h_c W_down[union]        dx: dx = dg_c W_gate[union] + du_c W_up[union]
//
// Work unit: one token tile (128 tokens) x 256 columns of D, K = the tile's union (twice for dx, in one accumulator, so
// that dx is rounded once). A: 16 KB blocks copied as they are by cp.async.bulk. B: 64 gathered weight rows x 512 bytes
// by cp.async, used as MN-major operand. Units are claimed from a counter, largest union first.
//
//   threads     384: gather warpgroup (88 registers), two consumer warpgroups of 64 x 256 (208 registers)
//   shared      4 stages x 48 KB + 18 KB epilogue staging
//   FLOPs       2 * 128 * D * (sum over tiles of 64 ceil(U / 64)) per product
//   L2 -> SM    48 KB per 4.2 MFLOP (85 FLOP/B); unique device-memory traffic: A once, W once (L2), out once
//   bound       tensor cores, then L2 -> SM bytes (7 TB/s at 75 % of cuBLAS's rate); with unions of a few blocks, the
//               epilogue, which the next unit's products do not hide
//   measured    H200, M 16384, D 2048, H 5632, mean union U: TFLOP/s on U columns of `down` (the kernel alone) and `dx`
//               (with its launches), share of cuBLAS's 790:
//                 U 411:  494 (63 %), 505 (64 %)        U 1478: 705 (89 %), 704 (89 %)
//                 U 1678: 704 (89 %), 718 (91 %)        U 3740: 770 (97 %), 771 (98 %)
#include "megasparse/gather_down.h"

#include "gather_gemm.cuh"
#include "token_rows.h"
#include "work_queue.cuh"

namespace megasparse {
namespace {

constexpr int kStages = 4;
constexpr int kStageBytes = kABytes + kBBytes;
constexpr int kThreads = 384;
constexpr int kGatherWarps = 4;

struct alignas(16) Work {
  int tile;  // negative: no more work
  int column;
  int block;
  int ksteps;  // of one product
};

struct Shared {
  uint64_t full[kStages];
  uint64_t empty[kStages];
  WorkSlots<Work> work;
};
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kConsumerWarps * kEpilogueWarpBytes + sizeof(Shared);
static_assert(kSharedBytes <= 232448, "shared memory of one block");

struct KernelParams {
  const uint8_t* a0;
  const uint8_t* a1;
  const uint8_t* w0;
  const uint8_t* w1;
  const int32_t* rows;  // [Mt, stride] weight rows
  const int32_t* block_ptr;
  const int32_t* tile_order;
  int32_t* counter;
  __nv_bfloat16* out;
  const int32_t* run_if;
  TokenRows token_rows;  // of out
  int64_t m;
  int64_t d;
  int64_t stride;
  int columns;
  int units;
};

// Claims the next unit in small steps, one a k-step of the running unit, so that no latency of the chain
// counter -> tile -> block range is waited for.
struct Claim {
  int step = 4;
  int unit = 0;
  Work next = {};

  __device__ __forceinline__ void advance(const KernelParams& p, WorkSlots<Work>& slots,
                                          hopper::RingState<kWorkSlots>& ring) {
    if (step == 0) {
      unit = gridDim.x + atomicAdd(p.counter, 1);
    } else if (step == 1) {
      next.tile = unit < p.units ? __ldg(p.tile_order + unit / p.columns) : -1;
      next.column = unit % p.columns * kTileN;
    } else if (step == 2) {
      if (next.tile >= 0) {
        next.block = __ldg(p.block_ptr + next.tile);
        next.ksteps = __ldg(p.block_ptr + next.tile + 1) - next.block;
      }
    } else if (step == 3) {
      post_work(slots, ring, next);
    }
    ++step;
  }
};

__global__ void __launch_bounds__(kThreads, 1) gather_down_kernel(const __grid_constant__ KernelParams p) {
  if (p.run_if != nullptr && *p.run_if == 0) return;
  extern __shared__ uint8_t raw[];
  uint8_t* stages = raw + (1024 - (hopper::smem_addr(raw) & 1023)) % 1024;
  uint8_t* epilogue = stages + kStages * kStageBytes;
  Shared& sh = *reinterpret_cast<Shared*>(epilogue + kConsumerWarps * kEpilogueWarpBytes);

  const int warpgroup = threadIdx.x / 128;
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  const int products = p.a1 != nullptr ? 2 : 1;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      hopper::mbarrier_init(&sh.full[s], 1 + kGatherWarps * 32);  // A's byte count, the gather threads
      hopper::mbarrier_init(&sh.empty[s], kConsumerWarps);
    }
    init_work(sh.work, kGatherWarps + kConsumerWarps);
    hopper::fence_mbarrier_init();
  }
  __syncthreads();

  hopper::RingState<kStages> ring;
  hopper::RingState<kWorkSlots> work_ring;

  if (warpgroup == 0) {
    hopper::setmaxnreg_decrease<88>();
    const bool leader = threadIdx.x == 0;
    Claim claim;
    hopper::RingState<kWorkSlots> post_ring;
    if (leader) {
      claim.unit = blockIdx.x;
      for (claim.step = 1; claim.step < 4;) claim.advance(p, sh.work, post_ring);
    }
    const bool copies_a = threadIdx.x == 32;  // another warp than the leader's
    const Gather gather(hopper::smem_addr(stages) + kABytes, warp, lane, p.d);
    while (true) {
      const Work work = take_work(sh.work, work_ring, lane);
      if (work.tile < 0) break;
      claim.step = 0;
      const int column = work.column + (lane & 7) * 8;
      const bool all_columns = work.column + kTileN <= p.d;
      uint32_t columns = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) columns |= column + j * 64 < p.d ? 1u << j : 0;
      const uint8_t* piece = p.w0 + column * 2;
      const uint8_t* a = p.a0 + static_cast<int64_t>(work.block) * kABytes;
      const int32_t* list = p.rows + work.tile * p.stride + gather.list_at;
      const auto rows_of = [&](int k) { return __ldg(reinterpret_cast<const int4*>(list + k * kTileK)); };
      const int steps = work.ksteps * products;
      // Lists are loaded two k-steps ahead; `k` wraps around for the second product.
      int4 rows = {}, next = {};
      int ahead = 0;
      const auto load_next = [&] {
        next = rows_of(ahead);
        if (++ahead == work.ksteps) ahead = 0;
      };
      if (steps > 0) {
        load_next();
        rows = next;
        load_next();
      }
      for (int s = 0; s < steps; ++s) {
        if (s == work.ksteps) {
          piece = p.w1 + column * 2;
          a = p.a1 + static_cast<int64_t>(work.block) * kABytes;
        }
        const int4 current = rows;
        rows = next;
        load_next();
        hopper::mbarrier_wait(&sh.empty[ring.stage], ring.parity ^ 1);
        if (copies_a) {
          hopper::mbarrier_arrive_expect_tx(&sh.full[ring.stage], kABytes);
          hopper::bulk_load(stages + ring.stage * kStageBytes, a, kABytes, &sh.full[ring.stage]);
        }
        a += kABytes;
        if (all_columns) {
          gather.copy<true>(ring.stage * kStageBytes, piece, current, columns);
        } else {
          gather.copy<false>(ring.stage * kStageBytes, piece, current, columns);
        }
        hopper::mbarrier_arrive_cp_async(&sh.full[ring.stage]);
        ring.advance();
        if (leader && claim.step < 4) claim.advance(p, sh.work, post_ring);
      }
      if (leader) {
        while (claim.step < 4) claim.advance(p, sh.work, post_ring);
      }
      __syncwarp();
    }
    hopper::cp_async_wait_all();
  } else {
    hopper::setmaxnreg_increase<208>();
    const int half = warpgroup - 1;
    const uint32_t smem = hopper::smem_addr(stages);
    const uint64_t a_desc = hopper::wgmma_descriptor_k_major(smem + half * (kABytes / 2));
    const uint64_t b_desc = hopper::wgmma_descriptor_mn_major(smem + kABytes, kSlabBytes);
    uint8_t* staging = epilogue + (half * 4 + warp) * kEpilogueWarpBytes;
    while (true) {
      const Work work = take_work(sh.work, work_ring, lane);
      if (work.tile < 0) break;
      float acc[128];
      const int steps = work.ksteps * products;
      if (steps == 0) {
#pragma unroll
        for (int i = 0; i < 128; ++i) acc[i] = 0.f;
      }
      mma_unit<kStages, kStageBytes, false>(acc, steps, a_desc, b_desc, sh.full, sh.empty, ring, lane);
      const int first_token = work.tile * kTileM + half * 64 + warp * 16;
      __nv_bfloat16* first_row = p.out + p.token_rows.row(first_token) * p.d;
      const int64_t row_stride = p.token_rows.sequences * p.d;
      store_bf16_tile(acc, staging, lane, work.column, p.d,
                      [&](int r) { return first_token + r < p.m ? first_row + r * row_stride : nullptr; });
    }
  }
}

// Zeroes the work counter and, where positions are not weight rows already, looks the union's weight rows up.
__global__ void __launch_bounds__(256) prepare_kernel(const int32_t* union_idx, const int32_t* order,
                                                      const int32_t* block_ptr, int32_t* rows, int32_t* counter,
                                                      int64_t stride) {
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *counter = 0;
  if (order == nullptr) return;
  const int count = (block_ptr[blockIdx.x + 1] - block_ptr[blockIdx.x]) * kTileK;
  const int64_t first = blockIdx.x * stride;
  for (int i = blockIdx.y * 256 + threadIdx.x; i < count; i += gridDim.y * 256) {
    const int position = union_idx[first + i];
    rows[first + i] = position >= 0 ? __ldg(order + position) : -1;
  }
}

}  // namespace

size_t gather_down_workspace_bytes(const GatherDownParams& p) {
  const int64_t tiles = (p.m + kTileM - 1) / kTileM;
  return 256 + (p.order != nullptr ? tiles * p.union_stride * sizeof(int32_t) : 0);
}

cudaError_t launch_gather_down(const GatherDownParams& p, void* workspace, cudaStream_t stream) {
  if (p.m <= 0 || p.d <= 0) return cudaSuccess;
  if (p.d % 8 != 0 || p.union_stride % 64 != 0 || !valid_sequences(p.m, p.sequences)) return cudaErrorInvalidValue;
  const int64_t tiles = (p.m + kTileM - 1) / kTileM;
  KernelParams k = {};
  k.a0 = static_cast<const uint8_t*>(p.a0);
  k.a1 = static_cast<const uint8_t*>(p.a1);
  k.w0 = static_cast<const uint8_t*>(p.w0);
  k.w1 = static_cast<const uint8_t*>(p.w1);
  k.counter = static_cast<int32_t*>(workspace);
  k.rows = p.order != nullptr ? k.counter + 64 : p.union_idx;
  k.block_ptr = p.block_ptr;
  k.tile_order = p.tile_order;
  k.out = static_cast<__nv_bfloat16*>(p.out);
  k.run_if = p.run_if;
  k.token_rows = make_token_rows(p.m, p.sequences);
  k.m = p.m;
  k.d = p.d;
  k.stride = p.union_stride;
  k.columns = static_cast<int>((p.d + kTileN - 1) / kTileN);
  k.units = static_cast<int>(tiles) * k.columns;
  const dim3 blocks = p.order != nullptr ? dim3(static_cast<unsigned>(tiles), 8) : dim3(1);
  prepare_kernel<<<blocks, 256, 0, stream>>>(
      p.union_idx, p.order, p.block_ptr, k.counter + 64, k.counter, p.union_stride);
  const cudaError_t error =
      cudaFuncSetAttribute(gather_down_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  gather_down_kernel<<<k.units < p.sm_count ? k.units : p.sm_count, kThreads, kSharedBytes, stream>>>(k);
  return cudaGetLastError();
}

}  // namespace megasparse
