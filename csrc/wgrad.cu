// Weight gradients: dW[tile of neurons, 256 columns of D] = A^T B, K = the tokens for which any neuron of the tile is
// active. Output stationary, so nothing is added atomically and fp32 main_grad is touched once.
//
//   gated dw_in   tile = 64 positions; A = [dg | du], 2 x 64 neurons, B = gathered rows of x
//   dw_down       tile = 128 positions; A = h, B = gathered rows of dy     (non-gated dw_in: A = du, B = x, likewise)
//
// A is built in shared memory from the packed values. The values of a line (one token's 64 neurons, 128 bytes) are a
// contiguous run: a lane copies it to staging bytes with cp.async one k-step ahead. Then a warp writes a line at a time: each
// lane owns two neurons, ranks them by the mask's bits below them, and stores a value or zero. No atomics, no divergence, the
// same cost at any density. B: 64 gathered token rows x 512 bytes by cp.async. Both operands lie [k][128 bytes], MN-major.
//
//   threads     384: four warps that gather and build (88 registers), two consumer warpgroups of 64 x 256 (208)
//   shared      3 stages x 48 KB + 36 KB staged values + 18 KB lists + 18 KB epilogue staging
//   FLOPs       2 * 128 * 256 * 64 a k-step; k-steps = ceil(D / 256) * (sum over tiles of ceil(tokens / 64))
//   L2 -> SM    32 KB of B, 1-2 KB of rows and 32 B or more a run of values per 4.2 MFLOP (about 115 FLOP/B)
//   bound       tensor cores, then gather bandwidth (x and dy are larger than L2)
//
// A tile with more tokens than a fair share is cut along K. Each chunk writes its fp32 tile to scratch; the last chunk to
// arrive adds them all up in chunk order, whoever it is.
#include "megasparse/wgrad.h"

#include "gather_gemm.cuh"
#include "wgrad_lists.cuh"
#include "work_queue.cuh"

namespace megasparse {
namespace {

constexpr int kStages = 3;
constexpr int kStageBytes = kABytes + kBBytes;
constexpr int kThreads = 384;
constexpr int kProducerWarps = 4;
constexpr int kRowsPerWarp = kTileK / kProducerWarps;
constexpr int kLists = 8;  // ring of list entries
constexpr int kListsAhead = 5;

// A run of up to 64 values, copied in 16-byte windows: 9 of them at worst.
constexpr int kRunBytes = 144;
constexpr int kRunBuffers = 2;

// What one k-step needs to know of its 64 tokens.
struct ListEntry {
  int32_t tokens[kTileK];
  TileRow rows[2][kTileK];
};

struct Shared {
  ListEntry entries[kLists];
  uint8_t runs[kRunBuffers][kProducerWarps][2][kRowsPerWarp][kRunBytes];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  ListSlots<kLists> lists;
  WorkSlots<WgradJob> work;
  int last_chunk[2];
};
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kConsumerWarps * kEpilogueWarpBytes + sizeof(Shared);
static_assert(kSharedBytes <= 232448, "shared memory of one block");

struct Product {
  const uint4* b;          // [M, D]
  const uint8_t* values[2];  // packed values of each half of the tile's 128 rows
  const int32_t* tokens;
  const TileRow* rows;
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

// Where a job's list entries are.
struct ListCursor {
  int product;
  int tile;
  int first;
};

// Claims the next job in small steps, one a k-step of the running job, so that no latency is waited for.
struct Claim {
  int step = 3;
  int unit = 0;
  WgradJob next = {};

  template <class Feeder>
  __device__ __forceinline__ void advance(const KernelParams& p, int units, WorkSlots<WgradJob>& slots,
                                          hopper::RingState<kWorkSlots>& ring, Feeder& feeder) {
    if (step == 0) {
      unit = gridDim.x + atomicAdd(p.state + 1, 1);
    } else if (step == 1) {
      if (unit < units) {
        next = p.jobs[unit / p.columns];
        next.column = unit % p.columns;
      } else {
        next.tile = -1;
        next.ksteps = 0;
      }
    } else if (step == 2) {
      post_work(slots, ring, next);
      feeder.announce({next.product, next.tile, next.first}, next.ksteps);
    }
    ++step;
  }
};

// Copies one run into staging bytes, from the 16-byte window that its first value is in.
__device__ __forceinline__ void stage_run(const uint8_t* values, const TileRow& row, uint32_t staged) {
  const int count = __popc(row.low) + __popc(row.high);
  if (count > 0) {
    const uint8_t* src = values + ((static_cast<uint64_t>(row.start) * 2) & ~15ull);
    const int bytes = (row.start & 7) * 2 + count * 2;
    for (int b = 0; b < bytes; b += 16) hopper::cp_async_16(staged + b, src + b, true);
  }
}

// A warp's 16 tokens of both halves of A. `lines` is the lane's 4 bytes of the first token's unswizzled line.
template <bool kSameNeurons>
__device__ __forceinline__ void build_lines(uint8_t* lines, const TileRow (&rows)[2][kTileK], int first,
                                            const uint8_t (&runs)[2][kRowsPerWarp][kRunBytes], int lane) {
  const uint32_t bit = 1u << (2 * (lane & 15));
  const bool upper = lane >= 16;
#pragma unroll 4
  for (int i = 0; i < kRowsPerWarp; ++i) {
    uint32_t word = 0, at = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 0 || !kSameNeurons) {
        const TileRow row = rows[half][first + i];
        word = upper ? row.high : row.low;
        at = (row.start & 7) + __popc(word & (bit - 1)) + (upper ? row.low_count : 0);
      }
      const uint16_t* run = reinterpret_cast<const uint16_t*>(runs[half][i]) + at;
      const bool even = word & bit, odd = word & (bit << 1);
      const uint32_t low = run[0], high = run[even ? 1 : 0];
      *reinterpret_cast<uint32_t*>(lines + half * (kABytes / 2) + i * 128 + ((lane * 4) ^ ((i & 7) << 4))) =
          (even ? low : 0) | (odd ? high << 16 : 0);
    }
  }
}

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
      hopper::mbarrier_init(&sh.full[s], kProducerWarps * 33);  // the copies of every thread, the built lines of every warp
      hopper::mbarrier_init(&sh.empty[s], kConsumerWarps);
    }
    init_lists(sh.lists, kProducerWarps);
    init_work(sh.work, kProducerWarps + kConsumerWarps);
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
    ListFeeder<ListCursor, kLists, kListsAhead> feeder;
    hopper::RingState<kLists> list_ring;
    const auto fetch = [&](const ListCursor& list, int step, int slot, uint64_t* full) {
      const Product& product = p.product[list.product];
      const int64_t at = (list.first + step) * kTileK;
      const TileRow* rows = product.rows + list.tile * product.row_subs * p.mp + at;
      ListEntry& entry = sh.entries[slot];
      hopper::mbarrier_arrive_expect_tx(full, kTileK * (4 + product.row_subs * sizeof(TileRow)));
      hopper::bulk_load(entry.tokens, product.tokens + list.tile * p.mp + at, kTileK * 4, full);
      hopper::bulk_load(entry.rows[0], rows, kTileK * sizeof(TileRow), full);
      if (product.row_subs == 2) hopper::bulk_load(entry.rows[1], rows + p.mp, kTileK * sizeof(TileRow), full);
    };
    if (leader) {
      claim.unit = blockIdx.x;
      for (claim.step = 1; claim.step < 3;) claim.advance(p, units, sh.work, post_ring, feeder);
    }
    const uint32_t row16 = static_cast<uint32_t>(p.d / 8);
    const uint32_t slab =
        hopper::smem_addr(stages) + kABytes + (lane / 8) * kSlabBytes + warp * kRowsPerWarp * 128;
    uint8_t* lines = stages + warp * kRowsPerWarp * 128;
    int buffer = 0;
    while (true) {
      const WgradJob job = take_work(sh.work, work_ring, lane);
      if (job.tile < 0) break;
      claim.step = 0;
      const Product& product = p.product[job.product];
      const int64_t column = static_cast<int64_t>(job.column) * kTileN + lane * 8;
      const bool in_range = column < p.d;
      const uint4* base = product.b + (in_range ? column / 8 : 0);
      const bool same_neurons = product.row_subs == 1;
      const int line_half = lane / 16, line = lane % 16;
      const uint8_t* values = product.values[line_half];
      // The values of one k-step's runs, one run a lane; always one group of copies.
      const auto stage_values = [&](int slot, int into) {
        const TileRow row = sh.entries[slot].rows[same_neurons ? 0 : line_half][warp * kRowsPerWarp + line];
        stage_run(values, row, hopper::smem_addr(sh.runs[into][warp][line_half][line]));
        hopper::cp_async_commit();
      };
      for (int k = 0; k < job.ksteps; ++k) {
        if (leader) {
          if (claim.step < 3) claim.advance(p, units, sh.work, post_ring, feeder);
          feeder.feed(sh.lists, fetch);
          --feeder.lead;
        }
        __syncwarp();
        const int slot = list_ring.stage;
        if (k == 0) {
          hopper::mbarrier_wait(&sh.lists.full[slot], list_ring.parity);
          stage_values(slot, buffer);
          hopper::cp_async_commit();
        }
        list_ring.advance();
        if (k + 1 < job.ksteps) {
          hopper::mbarrier_wait(&sh.lists.full[list_ring.stage], list_ring.parity);
          stage_values(list_ring.stage, buffer ^ 1);
        } else {
          hopper::cp_async_commit();
        }
        hopper::mbarrier_wait(&sh.empty[ring.stage], ring.parity ^ 1);
        gather_rows<kRowsPerWarp>(slab + ring.stage * kStageBytes, base, sh.entries[slot].tokens + warp * kRowsPerWarp, row16,
                                  in_range, lane);
        hopper::mbarrier_arrive_cp_async(&sh.full[ring.stage]);
        hopper::cp_async_commit();
        // Newer than this k-step's values: the last gather, the next values, this gather.
        hopper::cp_async_wait<3>();
        __syncwarp();
        uint8_t* to = lines + ring.stage * kStageBytes;
        if (same_neurons) {
          build_lines<true>(to, sh.entries[slot].rows, warp * kRowsPerWarp, sh.runs[buffer][warp], lane);
        } else {
          build_lines<false>(to, sh.entries[slot].rows, warp * kRowsPerWarp, sh.runs[buffer][warp], lane);
        }
        hopper::fence_async_proxy();
        __syncwarp();
        if (lane == 0) {
          hopper::mbarrier_arrive(&sh.full[ring.stage]);
          hopper::mbarrier_arrive(&sh.lists.empty[slot]);
        }
        ring.advance();
        buffer ^= 1;
      }
      if (leader) {
        while (claim.step < 3) claim.advance(p, units, sh.work, post_ring, feeder);
        feeder.feed(sh.lists, fetch);
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
        float* first = p.partials + static_cast<int64_t>(job.partial + job.column) * kTile + half * (kTile / 2) + thread * 4;
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
      const int64_t position = static_cast<int64_t>(job.tile) * 64 * product.row_subs + (product.row_subs - 1) * half * 64 +
                               warp * 16;
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
  ws.mp = (p.m + 127) / 128 * 128;
  ws.words = static_cast<int>((p.h_size + 63) / 64);
  ws.columns = static_cast<int>((p.d + kTileN - 1) / kTileN);
  ws.bits = static_cast<uint32_t*>(take(ws.words * ws.mp / 8));
  const int pairs = (ws.words + 1) / 2;
  for (int i = 0; i < 2; ++i) {
    WgradLists& list = ws.lists[i];
    if (i == 1 && !p.gated) {
      list = ws.lists[0];
      break;
    }
    list.subs = i == 0 && p.gated ? 1 : 2;
    list.tiles = list.subs == 1 ? ws.words : pairs;
    list.tokens = static_cast<int32_t*>(take(list.tiles * ws.mp * sizeof(int32_t)));
    list.rows = static_cast<TileRow*>(take(list.tiles * list.subs * ws.mp * sizeof(TileRow)));
    list.ksteps = static_cast<int32_t*>(take(list.tiles * sizeof(int32_t)));
  }
  // Cut tiles hold at most 4/3 of the 2 * sm_count shares; see plan_kernel.
  ws.max_partials = (8 * p.sm_count + 2) / 3 + 1;
  const int tiles = ws.lists[0].tiles + ws.lists[1].tiles;
  ws.jobs = static_cast<WgradJob*>(take((tiles + ws.max_partials) * sizeof(WgradJob)));
  ws.state = static_cast<int32_t*>(take((kArrivalsBegin + 2 * ws.max_partials) * sizeof(int32_t)));
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
  if (p.d % 8 != 0 || p.sm_count <= 0) return cudaErrorInvalidValue;
  WgradWorkspace ws = {};
  carve(p, workspace, ws);
  const int grid = p.sm_count;
  cudaError_t error = launch_wgrad_lists(p, ws, grid, stream);
  if (error != cudaSuccess) return error;

  KernelParams k = {};
  for (int i = 0; i < 2; ++i) {
    Product& product = k.product[i];
    const void* first = i == 1 ? p.h : p.gated ? p.dg : p.du;
    const void* second = i == 1 ? p.h : p.du;
    product.b = static_cast<const uint4*>(i == 1 ? p.dy : p.x);
    product.values[0] = static_cast<const uint8_t*>(first);
    product.values[1] = static_cast<const uint8_t*>(second);
    product.tokens = ws.lists[i].tokens;
    product.rows = ws.lists[i].rows;
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
