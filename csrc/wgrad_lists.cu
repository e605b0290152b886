// Token lists and job list of the weight gradients. Three small kernels, a few microseconds each.
//   activity: mask [Mp, W] -> one bit a (tile, token), transposed. Reads the mask once (8 B * Mp * W).
//   lists:    per tile, ascending tokens and where their values start. Writes 20 B per active (tile, token).
//   plan:     jobs, largest first; tiles with more work than a fair share are cut along K.
#include "wgrad_lists.cuh"

namespace megasparse {
namespace {

constexpr int kListThreads = 1024;

// Grid: (Mp / 32, ceil(W / 128)). Each warp turns 32 tokens of a tile into one word.
__global__ void __launch_bounds__(256) activity_kernel(const int64_t* __restrict__ mask, uint32_t* __restrict__ bits,
                                                       int words, int64_t mp) {
  __shared__ uint8_t active[32][132];
  const int first_word = blockIdx.y * 128;
  const int count = min(128, words - first_word);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * 32;
  const int x = threadIdx.x % 128;
  if (x < count) {
#pragma unroll 16
    for (int y = threadIdx.x / 128; y < 32; y += 2) {
      active[y][x] = __ldg(mask + (first_token + y) * words + first_word + x) != 0;
    }
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int w = threadIdx.x / 32; w < count; w += 8) {
    const uint32_t word = __ballot_sync(0xffffffffu, active[lane][w]);
    if (lane == 0) bits[(first_word + w) * (mp / 32) + blockIdx.x] = word;
  }
}

__device__ int exclusive_scan(int value, int* shared, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, i);
    if (lane >= i) sum += other;
  }
  if (lane == 31) shared[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    int warp_sum = shared[lane];
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, warp_sum, i);
      if (lane >= i) warp_sum += other;
    }
    shared[lane] = warp_sum;
  }
  __syncthreads();
  total = shared[31];
  const int before = warp > 0 ? shared[warp - 1] : 0;
  __syncthreads();
  return before + sum - value;
}

// One block a tile: blocks [0, lists[0].tiles) make product 0's lists, the rest product 1's. If both products use the same
// tiles (non-gated), product 1 points at product 0's lists and the grid ends there.
__global__ void __launch_bounds__(kListThreads) lists_kernel(const int64_t* __restrict__ mask,
                                                             const uint16_t* __restrict__ offset,
                                                             const int64_t* __restrict__ row_ptr, WgradWorkspace ws) {
  __shared__ int scan[32];
  const int product = static_cast<int>(blockIdx.x) >= ws.lists[0].tiles;
  const WgradLists& list = ws.lists[product];
  const int tile = blockIdx.x - product * ws.lists[0].tiles;
  const int first_word = tile * list.subs;
  const int subs = min(list.subs, ws.words - first_word);
  const int64_t bit_words = ws.mp / 32;
  int32_t* tokens = list.tokens + tile * ws.mp;

  int count = 0;
  for (int64_t begin = 0; begin < bit_words; begin += kListThreads) {
    const int64_t i = begin + threadIdx.x;
    uint32_t word = 0;
    if (i < bit_words) {
      for (int s = 0; s < subs; ++s) word |= ws.bits[(first_word + s) * bit_words + i];
    }
    int total;
    int at = count + exclusive_scan(__popc(word), scan, total);
    while (word != 0) {
      tokens[at++] = static_cast<int32_t>(i * 32 + __ffs(word) - 1);
      word &= word - 1;
    }
    count += total;
  }
  const int padded = (count + 63) / 64 * 64;
  if (threadIdx.x == 0) list.ksteps[tile] = padded / 64;
  if (count + static_cast<int>(threadIdx.x) < padded) tokens[count + threadIdx.x] = -1;
  __syncthreads();
  for (int sub = 0; sub < list.subs; ++sub) {
    TileRow* rows = list.rows + (static_cast<int64_t>(tile) * list.subs + sub) * ws.mp;
    for (int i = threadIdx.x; i < padded; i += kListThreads) {
      const int token = tokens[i];
      TileRow row = {0, 0, 0, 0};
      if (token >= 0 && sub < subs) {
        const int64_t at = static_cast<int64_t>(token) * ws.words + first_word + sub;
        const uint64_t bits = static_cast<uint64_t>(__ldg(mask + at));
        row.low = static_cast<uint32_t>(bits);
        row.high = static_cast<uint32_t>(bits >> 32);
        row.low_count = __popc(row.low);
        row.start = static_cast<uint32_t>(__ldg(row_ptr + token)) + __ldg(offset + at);
      }
      rows[i] = row;
    }
  }
}

// One block. Item i = a tile of a product; its k-steps are cut into chunks of about half a multiprocessor's fair share.
__global__ void __launch_bounds__(kListThreads) plan_kernel(WgradWorkspace ws, int grid, bool empty_tiles_too) {
  extern __shared__ int items[];  // [n] k-steps, then [n] chunks
  __shared__ int scan[32];
  const int n0 = ws.lists[0].tiles;
  const int n = n0 + ws.lists[1].tiles;
  int* ksteps = items;
  int* chunks = items + n;
  int sum = 0;
  for (int i = threadIdx.x; i < n; i += kListThreads) {
    ksteps[i] = i < n0 ? ws.lists[0].ksteps[i] : ws.lists[1].ksteps[i - n0];
    sum += ksteps[i];
  }
  int total;
  exclusive_scan(sum, scan, total);
  const int64_t all = static_cast<int64_t>(total) * ws.columns;
  const int share = max(static_cast<int>((all + 2 * grid - 1) / (2 * grid)), 16);
  for (int i = threadIdx.x; i < n; i += kListThreads) {
    chunks[i] = ksteps[i] == 0 ? empty_tiles_too : max(1, (ksteps[i] + share / 2) / share);
  }
  __syncthreads();
  int jobs = 0;
  for (int i = threadIdx.x; i < n; i += kListThreads) {
    const int mine = chunks[i];
    if (mine == 0) continue;
    const int size = (ksteps[i] + mine - 1) / mine;
    int rank = 0, partial = 0, split = 0;
    for (int j = 0; j < n; ++j) {
      const int theirs = chunks[j];
      if (theirs == 0) continue;
      const int their_size = (ksteps[j] + theirs - 1) / theirs;
      if (their_size > size || (their_size == size && j < i)) rank += theirs;
      if (theirs > 1 && j < i) {
        partial += theirs;
        ++split;
      }
    }
    if (mine > 1) {
      for (int c = 0; c < ws.columns * 2; ++c) ws.state[kArrivalsBegin + partial * ws.columns * 2 + c] = 0;
    }
    for (int c = 0; c < mine; ++c) {
      WgradJob job;
      job.product = i >= n0;
      job.tile = i >= n0 ? i - n0 : i;
      job.first = min(c * size, ksteps[i]);
      job.ksteps = min(size, ksteps[i] - job.first);
      job.chunk = c;
      job.chunks = mine;
      job.partial = partial * ws.columns;
      job.column = 0;
      ws.jobs[rank + c] = job;
    }
    jobs += mine;
  }
  exclusive_scan(jobs, scan, total);
  if (threadIdx.x == 0) {
    ws.state[0] = total * ws.columns;
    ws.state[1] = 0;
  }
}

}  // namespace

cudaError_t launch_wgrad_lists(const WgradParams& p, const WgradWorkspace& ws, int grid, cudaStream_t stream) {
  const bool shared_lists = ws.lists[0].tokens == ws.lists[1].tokens;
  if (ws.mp > 0) {
    const dim3 blocks(static_cast<unsigned>(ws.mp / 32), (ws.words + 127) / 128);
    activity_kernel<<<blocks, 256, 0, stream>>>(p.mask, ws.bits, ws.words, ws.mp);
  }
  const int tiles = ws.lists[0].tiles + (shared_lists ? 0 : ws.lists[1].tiles);
  lists_kernel<<<tiles, kListThreads, 0, stream>>>(p.mask, reinterpret_cast<const uint16_t*>(p.offset), p.row_ptr, ws);
  const int items = ws.lists[0].tiles + ws.lists[1].tiles;
  plan_kernel<<<1, kListThreads, 2 * items * sizeof(int), stream>>>(ws, grid, p.output != WgradOutput::kFp32Accumulate);
  return cudaGetLastError();
}

}  // namespace megasparse
