// down: y = h_c W_down[union]        dx: dx = dg_c W_gate[union] + du_c W_up[union]
//
// Work unit: one token tile (128 tokens) x 256 columns of D, K = the tile's union (twice for dx, in one accumulator, so
// that dx is rounded once). A: 16 KB blocks copied as they are by cp.async.bulk. B: 64 gathered weight rows x 512 bytes by
// cp.async, used as MN-major operand. Units are claimed from a counter, largest union first.
//
//   threads     384: gather warpgroup (56 registers), two consumer warpgroups of 64 x 256 (224 registers)
//   shared      4 stages x 48 KB + 18 KB epilogue staging
//   FLOPs       2 * 128 * D * (sum over tiles of 64 ceil(U / 64)) per product
//   L2 -> SM    48 KB per 4.2 MFLOP (85 FLOP/B); unique device-memory traffic: A once, W once (L2), out once
//   bound       tensor cores, then L2 -> SM bytes (7 TB/s needed at 75 % of cuBLAS's rate)
#include "megasparse/gather_down.h"

#include "gather_gemm.cuh"
#include "work_queue.cuh"

namespace megasparse {
namespace {

constexpr int kStages = 4;
constexpr int kStageBytes = kABytes + kBBytes;
constexpr int kThreads = 384;

struct alignas(16) Work {
  int tile;  // negative: no more work
  int column;
  int block;
  int ksteps;  // of one product
};

constexpr int kReaders = 4 + kConsumerWarps;  // warps that read a work slot

struct Shared {
  uint64_t full[kStages];
  uint64_t empty[kStages];
  WorkSlots<Work> work;
};
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kConsumerWarps * kEpilogueWarpBytes + sizeof(Shared);
static_assert(kSharedBytes <= 232448, "shared memory of one block");

// Claims the next unit in small steps, one a k-step of the running unit, so that no latency of the chain
// counter -> tile -> block range is waited for.
struct Claim {
  int step = 4;
  int unit = 0;
  Work next = {};

  __device__ __forceinline__ void advance(const GatherDownParams& p, int units, int columns, WorkSlots<Work>& slots,
                                          hopper::RingState<kWorkSlots>& ring) {
    if (step == 0) {
      unit = gridDim.x + atomicAdd(p.counter, 1);
    } else if (step == 1) {
      next.tile = unit < units ? __ldg(p.tile_order + unit / columns) : -1;
      next.column = unit % columns * kTileN;
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

__global__ void __launch_bounds__(kThreads, 1) gather_down_kernel(const GatherDownParams p) {
  extern __shared__ uint8_t raw[];
  const uint32_t raw_address = hopper::smem_addr(raw);
  uint8_t* stages = raw + (1024 - (raw_address & 1023)) % 1024;
  uint8_t* epilogue = stages + kStages * kStageBytes;
  Shared& sh = *reinterpret_cast<Shared*>(epilogue + kConsumerWarps * kEpilogueWarpBytes);

  const int warpgroup = threadIdx.x / 128;
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  const int columns = static_cast<int>((p.d + kTileN - 1) / kTileN);
  const int tiles = static_cast<int>((p.m + kTileM - 1) / kTileM);
  const int units = tiles * columns;
  const int products = p.a1 != nullptr ? 2 : 1;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      hopper::mbarrier_init(&sh.full[s], 1 + 128);  // A's byte count, the gather threads
      hopper::mbarrier_init(&sh.empty[s], kConsumerWarps);
    }
    init_work(sh.work, kReaders);
    hopper::fence_mbarrier_init();
  }
  __syncthreads();

  hopper::RingState<kStages> ring;
  hopper::RingState<kWorkSlots> work_ring;

  if (warpgroup == 0) {
    hopper::setmaxnreg_decrease<56>();
    const bool leader = threadIdx.x == 0;
    Claim claim;
    hopper::RingState<kWorkSlots> post_ring;
    if (leader) {
      claim.unit = blockIdx.x;
      for (claim.step = 1; claim.step < 4;) claim.advance(p, units, columns, sh.work, post_ring);
    }
    const uint32_t row16 = static_cast<uint32_t>(p.d / 8);
    const uint32_t slab = hopper::smem_addr(stages) + kABytes + (lane / 8) * kSlabBytes + warp * 2048;
    while (true) {
      const Work work = take_work(sh.work, work_ring, lane);
      if (work.tile < 0) break;
      claim.step = 0;
      const bool in_range = work.column + lane * 8 < p.d;
      const int64_t piece = in_range ? work.column / 8 + lane : 0;
      const int32_t* idx = p.union_idx + work.tile * p.union_stride + warp * 16 + lane;
      const int steps = work.ksteps * products;
      // Weight row of the next step, position of the one after.
      int position = lane < 16 && steps > 0 ? __ldg(idx) : -1;
      int row = position >= 0 && p.order != nullptr ? __ldg(p.order + position) : position;
      position = lane < 16 && steps > 1 ? __ldg(idx + (work.ksteps > 1 ? 64 : 0)) : -1;
      for (int s = 0; s < steps; ++s) {
        if (leader && claim.step < 4) claim.advance(p, units, columns, sh.work, post_ring);
        const int current = row;
        row = position >= 0 && p.order != nullptr ? __ldg(p.order + position) : position;
        int after = s + 2;
        if (after < steps) {
          while (after >= work.ksteps) after -= work.ksteps;
          if (lane < 16) position = __ldg(idx + after * 64);
        }
        const bool second = s >= work.ksteps;
        const int k = second ? s - work.ksteps : s;
        hopper::mbarrier_wait(&sh.empty[ring.stage], ring.parity ^ 1);
        if (leader) {
          const uint8_t* a = static_cast<const uint8_t*>(second ? p.a1 : p.a0);
          hopper::mbarrier_arrive_expect_tx(&sh.full[ring.stage], kABytes);
          hopper::bulk_load(stages + ring.stage * kStageBytes,
                            a + static_cast<int64_t>(work.block + k) * kABytes, kABytes, &sh.full[ring.stage]);
        }
        __syncwarp();
        const uint4* base = static_cast<const uint4*>(second ? p.w1 : p.w0) + piece;
        gather_rows<16>(slab + ring.stage * kStageBytes, base, current, row16, in_range, lane);
        hopper::mbarrier_arrive_cp_async(&sh.full[ring.stage]);
        ring.advance();
      }
      if (leader) {
        while (claim.step < 4) claim.advance(p, units, columns, sh.work, post_ring);
      }
      __syncwarp();
    }
    hopper::cp_async_wait_all();
  } else {
    hopper::setmaxnreg_increase<224>();
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
      const int64_t first_row = static_cast<int64_t>(work.tile) * kTileM + half * 64 + warp * 16;
      __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.out);
      store_bf16_tile(acc, staging, lane, work.column, p.d, [&](int r) {
        return first_row + r < p.m ? out + (first_row + r) * p.d : nullptr;
      });
    }
  }
}

}  // namespace

cudaError_t launch_gather_down(const GatherDownParams& p, cudaStream_t stream) {
  if (p.m <= 0 || p.d <= 0) return cudaSuccess;
  if (p.d % 8 != 0 || p.union_stride % 64 != 0) return cudaErrorInvalidValue;
  cudaError_t error = cudaFuncSetAttribute(gather_down_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(p.counter, 0, sizeof(int32_t), stream);
  if (error != cudaSuccess) return error;
  const int64_t units = (p.m + kTileM - 1) / kTileM * ((p.d + kTileN - 1) / kTileN);
  const int grid = static_cast<int>(units < p.sm_count ? units : p.sm_count);
  gather_down_kernel<<<grid, kThreads, kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace megasparse
