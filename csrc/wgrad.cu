// Weight gradients: dW[tile of neurons, 256 columns of D] = A^T B, K = the tokens for which any neuron of the tile is
// active. Output stationary, so nothing is added atomically and fp32 main_grad is touched once.
//
//   gated dw_in   tile = 64 positions; A = [dg | du], 2 x 64 neurons, B = gathered rows of x
//   dw_down       tile = 128 positions; A = h, B = gathered rows of dy     (non-gated dw_in: A = du, B = x, likewise)
//
// A small kernel unpacks A (wgrad_lists.cu) into 16 KB blocks, copied by cp.async.bulk. B: 64 gathered token rows x 512
// bytes by cp.async. Both operands lie [k][128 bytes], that is MN-major. (Building A here from the packed values, in the
// producer warps, was three times slower: one warp a scheduler cannot issue it beside the gather.)
//
//   threads     384: gather warpgroup (88 registers), two consumer warpgroups of 64 x 256 (208)
//   shared      4 stages x 48 KB + 18 KB epilogue staging
//   FLOPs       2 * 128 * 256 * 64 a k-step; k-steps = ceil(D / 256) * (sum over tiles of ceil(tokens / 64))
//   L2 -> SM    48 KB per 4.2 MFLOP (85 FLOP/B)
//   bound       tensor cores, then gather bandwidth (x and dy are larger than L2); with few hot tiles, how evenly they
//               can be cut
//   measured    H200, M 16384, D 2048, H 5632, neurons by frequency; f = active (tile, token) pairs at 64 / 128 positions:
//               this kernel's TFLOP/s (share of cuBLAS's 790), time of the whole launch, bf16 / fp32 accumulate:
//                 f .071 / .085: 553 (70 %)  0.24 / 0.24 ms        f .211 / .260: 738 (93 %)   0.48 / 0.52 ms
//                 f .308 / .368: 761 (96 %)  0.65 / 0.67 ms        f .694 / .791: 796 (101 %)  1.31 / 1.41 ms
//
// A tile with more tokens than a fair share is cut along K. Each chunk writes its fp32 tile to scratch; the last chunk
// to arrive adds them all up in chunk order, whoever it is.
#include "megasparse/wgrad.h"

#include "gather_gemm.cuh"
#include "wgrad_lists.cuh"
#include "work_queue.cuh"

namespace megasparse {
namespace {

constexpr int kStages = 4;
constexpr int kStageBytes = kABytes + kBBytes;
constexpr int kThreads = 384;
constexpr int kGatherWarps = 4;

struct Shared {
  uint64_t full[kStages];
  uint64_t empty[kStages];
  WorkSlots<WgradJob> work;
  int last_chunk[2];
};
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kConsumerWarps * kEpilogueWarpBytes + sizeof(Shared);
static_assert(kSharedBytes <= 232448, "shared memory of one block");

struct Product {
  const uint8_t* b;        // [M, D]
  const uint8_t* blocks;   // A
  const int32_t* rows;     // of b: the lists' tokens
  void* out[2];            // [H, D] each
  int row_subs;            // 64-position tiles in a tile
};

struct KernelParams {
  Product product[2];
  const int32_t* order;
  const WgradJob* jobs;
  int32_t* state;
  float* partials;
  int64_t h;
  int64_t d;
  int64_t mp;
  int columns;
  WgradOutput output;
};

// Claims the next job: the counter first, a k-step later the job, so that the counter's latency is not waited for.
struct Claim {
  int step = 2;
  int unit = 0;

  __device__ __forceinline__ void advance(const KernelParams& p, int units, WorkSlots<WgradJob>& slots,
                                          hopper::RingState<kWorkSlots>& ring) {
    if (step == 0) {
      unit = gridDim.x + atomicAdd(p.state + 1, 1);
    } else if (step == 1) {
      WgradJob next = {};
      next.tile = -1;
      if (unit < units) {
        next = p.jobs[unit / p.columns];
        next.column = unit % p.columns;
      }
      post_work(slots, ring, next);
    }
    ++step;
  }
};

__device__ __forceinline__ void store_fp32(float* row, int64_t c, float a, float b, bool accumulate) {
  if (accumulate) {
    hopper::red_add_f32x2(row + c, a, b);
  } else {
    *reinterpret_cast<float2*>(row + c) = make_float2(a, b);
  }
}

__global__ void __launch_bounds__(kThreads, 1) wgrad_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ uint8_t raw[];
  uint8_t* stages = raw + (1024 - (hopper::smem_addr(raw) & 1023)) % 1024;
  uint8_t* epilogue = stages + kStages * kStageBytes;
  Shared& sh = *reinterpret_cast<Shared*>(epilogue + kConsumerWarps * kEpilogueWarpBytes);

  const int warpgroup = threadIdx.x / 128;
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;

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
    const int units = p.state[0];
    Claim claim;
    hopper::RingState<kWorkSlots> post_ring;
    if (leader) {
      claim.unit = blockIdx.x;
      for (claim.step = 1; claim.step < 2;) claim.advance(p, units, sh.work, post_ring);
    }
    const bool copies_a = threadIdx.x == 32;  // another warp than the leader's
    const Gather gather(hopper::smem_addr(stages) + kABytes, warp, lane, p.d);
    while (true) {
      const WgradJob job = take_work(sh.work, work_ring, lane);
      if (job.tile < 0) break;
      claim.step = 0;
      const Product& product = p.product[job.product];
      const int column = job.column * kTileN + (lane & 7) * 8;
      const bool all_columns = (job.column + 1) * kTileN <= p.d;
      uint32_t columns = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) columns |= column + j * 64 < p.d ? 1u << j : 0;
      const uint8_t* piece = product.b + column * 2;
      const uint8_t* a = product.blocks + (job.tile * (p.mp / kTileK) + job.first) * kABytes;
      const int32_t* list = product.rows + job.tile * p.mp + job.first * kTileK + gather.list_at;
      const auto rows_of = [&](int k) { return __ldg(reinterpret_cast<const int4*>(list + k * kTileK)); };
      // Lists are loaded two k-steps ahead.
      int4 rows = {}, next = {};
      if (job.ksteps > 0) rows = rows_of(0);
      if (job.ksteps > 1) next = rows_of(1);
      for (int k = 0; k < job.ksteps; ++k) {
        const int4 current = rows;
        rows = next;
        if (k + 2 < job.ksteps) next = rows_of(k + 2);
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
        if (leader && claim.step < 2) claim.advance(p, units, sh.work, post_ring);
      }
      if (leader) {
        while (claim.step < 2) claim.advance(p, units, sh.work, post_ring);
      }
      __syncwarp();
    }
    hopper::cp_async_wait_all();
  } else {
    hopper::setmaxnreg_increase<208>();
    const int half = warpgroup - 1;
    const int thread = threadIdx.x % 128;
    const uint32_t smem = hopper::smem_addr(stages);
    const uint64_t a_desc = hopper::wgmma_descriptor_mn_major(smem + half * (kABytes / 2), kSlabBytes);
    const uint64_t b_desc = hopper::wgmma_descriptor_mn_major(smem + kABytes, kSlabBytes);
    uint8_t* staging = epilogue + (half * 4 + warp) * kEpilogueWarpBytes;
    while (true) {
      const WgradJob job = take_work(sh.work, work_ring, lane);
      if (job.tile < 0) break;
      float acc[128];
      if (job.ksteps == 0) {
#pragma unroll
        for (int i = 0; i < 128; ++i) acc[i] = 0.f;
      }
      mma_unit<kStages, kStageBytes, true>(acc, job.ksteps, a_desc, b_desc, sh.full, sh.empty, ring, lane);

      if (job.chunks > 1) {
        constexpr int kTile = kTileM * kTileN;
        float* first =
            p.partials + static_cast<int64_t>(job.partial + job.column) * kTile + half * (kTile / 2) + thread * 4;
        const int64_t chunk_stride = static_cast<int64_t>(p.columns) * kTile;
        float* mine = first + job.chunk * chunk_stride;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          __stcg(reinterpret_cast<float4*>(mine + i * 512),
                 make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
        }
        __threadfence();
        hopper::named_barrier_sync(1 + half, 128);
        if (thread == 0) {
          int32_t* arrivals = p.state + kArrivalsBegin + (job.partial + job.column) * 2 + half;
          sh.last_chunk[half] = atomicAdd(arrivals, 1) == job.chunks - 1;
          __threadfence();
        }
        hopper::named_barrier_sync(1 + half, 128);
        const bool last = sh.last_chunk[half];
        hopper::named_barrier_sync(1 + half, 128);
        if (!last) continue;
        __threadfence();
#pragma unroll
        for (int i = 0; i < 128; ++i) acc[i] = 0.f;
        for (int c = 0; c < job.chunks; ++c) {
#pragma unroll
          for (int i = 0; i < 32; ++i) {
            const float4 v = __ldcg(reinterpret_cast<const float4*>(first + c * chunk_stride + i * 512));
            acc[4 * i] += v.x;
            acc[4 * i + 1] += v.y;
            acc[4 * i + 2] += v.z;
            acc[4 * i + 3] += v.w;
          }
        }
      }

      const Product& product = p.product[job.product];
      const int64_t column = static_cast<int64_t>(job.column) * kTileN;
      const int subs = product.row_subs;
      const int64_t position = (static_cast<int64_t>(job.tile) * subs + (subs - 1) * half) * 64 + warp * 16;
      const auto weight_row = [&](int r) -> int64_t {
        const int64_t at = position + r;
        return at >= p.h ? -1 : p.order != nullptr ? __ldg(p.order + at) : at;
      };
      if (p.output == WgradOutput::kBf16) {
        __nv_bfloat16* out = static_cast<__nv_bfloat16*>(product.out[half]);
        store_bf16_tile(acc, staging, lane, column, p.d, [&](int r) {
          const int64_t n = weight_row(r);
          return n >= 0 ? out + n * p.d : nullptr;
        });
      } else {
        const bool accumulate = p.output == WgradOutput::kFp32Accumulate;
        float* out = static_cast<float*>(product.out[half]);
        const int64_t rows[2] = {weight_row(lane / 4), weight_row(lane / 4 + 8)};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (rows[r] < 0) continue;
          float* row = out + rows[r] * p.d + column + lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < 32; ++j) {
            if (column + lane % 4 * 2 + j * 8 < p.d) {
              store_fp32(row, j * 8, acc[4 * j + 2 * r], acc[4 * j + 2 * r + 1], accumulate);
            }
          }
        }
      }
    }
  }
}

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Cuts the scratch up; with a null base, only counts.
size_t carve(const WgradParams& p, void* base, WgradWorkspace& ws) {
  size_t used = 0;
  const auto take = [&](size_t bytes) {
    uint8_t* at = static_cast<uint8_t*>(base) + used;
    used += aligned(bytes);
    return base != nullptr ? static_cast<void*>(at) : nullptr;
  };
  ws.token_rows = make_token_rows(p.m, p.sequences);
  ws.mp = (p.m + 127) / 128 * 128;
  ws.words = static_cast<int>((p.h_size + 63) / 64);
  ws.columns = static_cast<int>((p.d + kTileN - 1) / kTileN);
  ws.bits = static_cast<uint32_t*>(take(ws.words * ws.mp / 8));
  ws.shared_lists = !p.gated;
  const int pairs = (ws.words + 1) / 2;
  for (int i = 0; i < 2; ++i) {
    WgradLists& list = ws.lists[i];
    list.subs = i == 0 && p.gated ? 1 : 2;
    list.tiles = list.subs == 1 ? ws.words : pairs;
    if (i == 1 && !p.gated) {
      list.tokens = ws.lists[0].tokens;
      list.rows = ws.lists[0].rows;
      list.ksteps = ws.lists[0].ksteps;
    } else {
      list.tokens = static_cast<int32_t*>(take(list.tiles * ws.mp * sizeof(int32_t)));
      list.rows = p.sequences == 1 ? list.tokens : static_cast<int32_t*>(take(list.tiles * ws.mp * sizeof(int32_t)));
      list.ksteps = static_cast<int32_t*>(take(list.tiles * sizeof(int32_t)));
    }
    list.blocks = static_cast<uint8_t*>(take(list.tiles * (ws.mp / kTileK) * kABytes));
  }
  // Cut tiles hold at most 4/3 of the 2 * sm_count shares; see plan_kernel.
  ws.max_partials = (8 * p.sm_count + 2) / 3 + 1;
  const int tiles = ws.lists[0].tiles + ws.lists[1].tiles;
  ws.jobs = static_cast<WgradJob*>(take((tiles + ws.max_partials) * sizeof(WgradJob)));
  ws.state = static_cast<int32_t*>(take((kArrivalsBegin + 2 * ws.max_partials) * sizeof(int32_t)));
  ws.first_block = static_cast<int32_t*>(take(tiles * sizeof(int32_t)));
  ws.block_item = static_cast<int32_t*>(take(tiles * (ws.mp / kTileK) * sizeof(int32_t)));
  ws.partials = static_cast<float*>(take(static_cast<size_t>(ws.max_partials) * kTileM * kTileN * sizeof(float)));
  return used;
}

}  // namespace

size_t wgrad_workspace_bytes(const WgradParams& p) {
  WgradWorkspace ws = {};
  return carve(p, nullptr, ws);
}

cudaError_t launch_wgrad(const WgradParams& p, void* workspace, cudaStream_t stream) {
  if (p.h_size <= 0 || p.d <= 0) return cudaSuccess;
  if (p.d % 8 != 0 || p.sm_count <= 0 || !valid_sequences(p.m, p.sequences)) return cudaErrorInvalidValue;
  WgradWorkspace ws = {};
  carve(p, workspace, ws);
  const int grid = p.sm_count;
  cudaError_t error = launch_wgrad_lists(p, ws, grid, stream);
  if (error != cudaSuccess) return error;

  KernelParams k = {};
  for (int i = 0; i < 2; ++i) {
    Product& product = k.product[i];
    product.b = static_cast<const uint8_t*>(i == 1 ? p.dy : p.x);
    product.rows = ws.lists[i].rows;
    product.blocks = ws.lists[i].blocks;
    product.row_subs = ws.lists[i].subs;
    product.out[0] = i == 1 ? p.dw_down : p.dw_in;
    product.out[1] = product.out[0];
  }
  if (p.gated) {
    const int64_t element = p.output == WgradOutput::kBf16 ? 2 : 4;
    k.product[0].out[1] = static_cast<uint8_t*>(p.dw_in) + p.h_size * p.d * element;
  }
  k.order = p.order;
  k.jobs = ws.jobs;
  k.state = ws.state;
  k.partials = ws.partials;
  k.h = p.h_size;
  k.d = p.d;
  k.mp = ws.mp;
  k.columns = ws.columns;
  k.output = p.output;
  error = cudaFuncSetAttribute(wgrad_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  wgrad_kernel<<<grid, kThreads, kSharedBytes, stream>>>(k);
  return cudaGetLastError();
}

}  // namespace megasparse
