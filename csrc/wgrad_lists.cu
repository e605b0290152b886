// Token lists and job list of the weight gradients. Four small kernels.
//   activity: mask [Mp, W] -> one bit a (tile, token), transposed. Reads the mask once (8 B * Mp * W).
//   lists:    per tile, ascending tokens and their rows of x and dy.
//   plan:     jobs, largest first; tiles with more work than a fair share are cut along K.
//   unpack:   packed values -> operand A in blocks. Writes 256 B per listed token of a tile; bound by its loads of single
//             values (half of the device's write bandwidth where tiles are full).
// Measured on an H200, M 16384, H 5632, at 7 / 21 / 31 / 69 % of (tile, token) pairs active: activity 7 us, lists 5 us,
// plan 5-8 us, unpack 17 / 53 / 75 / 180 us.
#include "wgrad_lists.cuh"

namespace megasparse {
namespace {

constexpr int kListThreads = 1024;
constexpr int kUnpackThreads = 256;

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

// One block a tile: blocks [0, lists[0].tiles) make product 0's lists, the rest product 1's. If both products have the
// same tiles (non-gated), product 1 points at product 0's lists and the grid ends there.
__global__ void __launch_bounds__(kListThreads) lists_kernel(WgradWorkspace ws) {
  __shared__ int scan[32];
  const int product = static_cast<int>(blockIdx.x) >= ws.lists[0].tiles;
  const WgradLists& list = ws.lists[product];
  const int tile = blockIdx.x - product * ws.lists[0].tiles;
  const int first_word = tile * list.subs;
  const int subs = min(list.subs, ws.words - first_word);
  const int64_t bit_words = ws.mp / 32;
  int32_t* tokens = list.tokens + tile * ws.mp;
  int32_t* rows = list.rows + tile * ws.mp;
  const bool rows_differ = rows != tokens;

  int count = 0;
  for (int64_t begin = 0; begin < bit_words; begin += kListThreads) {
    const int64_t i = begin + threadIdx.x;
    uint32_t word = 0;
    if (i < bit_words) {
      for (int s = 0; s < subs; ++s) word |= ws.bits[(first_word + s) * bit_words + i];
    }
    int total;
    const int at = count + exclusive_scan(__popc(word), scan, total);
    // A warp writes the tokens of its 32 words, a word at a time, so that stores are contiguous.
    const int lane = threadIdx.x % 32;
    const int32_t token = static_cast<int32_t>((i - lane) * 32) + lane;
    const uint32_t below = (1u << lane) - 1;
    // The 32 tokens of a word belong to one sequence.
    const int32_t first_token = static_cast<int32_t>(i < bit_words ? i * 32 : 0);
    const int32_t first_row = rows_differ ? static_cast<int32_t>(ws.token_rows.row(first_token)) : 0;
    const int32_t row = lane * ws.token_rows.sequences;
#pragma unroll 4
    for (int j = 0; j < 32; ++j) {
      const uint32_t bits = __shfl_sync(0xffffffffu, word, j);
      const int to = __shfl_sync(0xffffffffu, at, j) + __popc(bits & below);
      if (bits >> lane & 1) tokens[to] = token + j * 32;
      if (rows_differ) {
        const int32_t word_row = __shfl_sync(0xffffffffu, first_row, j);
        if (bits >> lane & 1) rows[to] = word_row + row;
      }
    }
    count += total;
  }
  const int padded = (count + 63) / 64 * 64;
  if (threadIdx.x == 0) list.ksteps[tile] = padded / 64;
  if (count + static_cast<int>(threadIdx.x) < padded) tokens[count + threadIdx.x] = rows[count + threadIdx.x] = -1;
}

// Unpacks the listed tokens' values into the blocks of operand A. Eight lanes a line of 64 positions, 16 bytes each.
// Blocks of 64 tokens are dealt out round robin.
__global__ void __launch_bounds__(kUnpackThreads) unpack_kernel(
    const int64_t* __restrict__ mask, const uint16_t* __restrict__ offset, const int64_t* __restrict__ row_ptr,
    const uint16_t* __restrict__ dg, const uint16_t* __restrict__ du, const uint16_t* __restrict__ h,
    WgradWorkspace ws) {
  const int blocks = ws.state[2];
  const int chunk = threadIdx.x & 7;
  for (int b = blockIdx.x; b < blocks; b += gridDim.x) {
    const int item = ws.block_item[b];
    const int product = item >= ws.lists[0].tiles;
    const int tile = item - product * ws.lists[0].tiles;
    const int kstep = b - ws.first_block[item];
    const int subs = ws.lists[product].subs;
    const int first_word = tile * subs;
    const int32_t* tokens = ws.lists[product].tokens + tile * ws.mp + kstep * 64;
    uint8_t* block = ws.lists[product].blocks + (tile * (ws.mp / 64) + kstep) * kWgradBlockBytes;
    const uint16_t* values[2] = {product == 1 ? h : dg != nullptr ? dg : du, product == 1 ? h : du};
#pragma unroll
    for (int pass = 0; pass < 64 * 8 / kUnpackThreads; ++pass) {
      const int i = pass * (kUnpackThreads / 8) + threadIdx.x / 8;
      const int64_t token = tokens[i];
      const int64_t row_start = token >= 0 ? __ldg(row_ptr + token) : 0;
      uint8_t* line = block + i * 128 + ((chunk ^ (i & 7)) << 4);
      uint32_t bits = 0;
      int64_t start = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half == 0 || subs == 2) {
          bits = 0;
          if (token >= 0 && first_word + half < ws.words) {
            const int64_t at = token * ws.words + first_word + half;
            const uint64_t word = static_cast<uint64_t>(__ldg(mask + at));
            bits = static_cast<uint32_t>(word >> (chunk * 8)) & 255;
            start = row_start + __ldg(offset + at) + __popcll(word & ((uint64_t{1} << (chunk * 8)) - 1));
          }
        }
        const uint16_t* run = values[half] + start;
        uint32_t value[8];
        int rank = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          value[j] = bits >> j & 1 ? __ldg(run + rank) : 0;
          rank += bits >> j & 1;
        }
        *reinterpret_cast<uint4*>(line + half * (kWgradBlockBytes / 2)) =
            make_uint4(value[0] | value[1] << 16, value[2] | value[3] << 16, value[4] | value[5] << 16,
                       value[6] | value[7] << 16);
      }
    }
  }
}

// One block. Item i = a tile of a product; its k-steps are cut into chunks of about half a multiprocessor's fair share.
__global__ void __launch_bounds__(kListThreads) plan_kernel(WgradWorkspace ws, int grid, bool empty_tiles_too) {
  extern __shared__ int items[];  // [n] k-steps, [n] chunks, [n] k-steps of a chunk,
                                // [n] blocks before
  __shared__ int scan[32];
  const int n0 = ws.lists[0].tiles;
  const int n = n0 + ws.lists[1].tiles;
  int* ksteps = items;
  int* chunks = items + n;
  int* sizes = items + 2 * n;
  int* first_block = items + 3 * n;
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
    const int count = ksteps[i] == 0 ? empty_tiles_too : max(1, (ksteps[i] + share / 2) / share);
    chunks[i] = count;
    sizes[i] = count > 0 ? (ksteps[i] + count - 1) / count : -1;
  }
  __syncthreads();
  if (threadIdx.x == 0) ws.state[2] = total;
  int jobs = 0;
  for (int i = threadIdx.x; i < n; i += kListThreads) {
    const int mine = chunks[i];
    const int size = sizes[i];
    int rank = 0, partial = 0, block = 0;
#pragma unroll 8
    for (int j = 0; j < n; ++j) {
      const int theirs = chunks[j], their_size = sizes[j];
      block += j < i ? ksteps[j] : 0;
      rank += their_size > size || (their_size == size && j < i) ? theirs : 0;
      partial += theirs > 1 && j < i ? theirs : 0;
    }
    first_block[i] = block;
    ws.first_block[i] = block;
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
  for (int i = threadIdx.x / 32; i < n; i += kListThreads / 32) {
    for (int k = threadIdx.x % 32; k < ksteps[i]; k += 32) ws.block_item[first_block[i] + k] = i;
  }
}

}  // namespace

cudaError_t launch_wgrad_lists(const WgradParams& p, const WgradWorkspace& ws, int grid, cudaStream_t stream) {
  if (ws.mp > 0) {
    const dim3 blocks(static_cast<unsigned>(ws.mp / 32), (ws.words + 127) / 128);
    activity_kernel<<<blocks, 256, 0, stream>>>(p.mask, ws.bits, ws.words, ws.mp);
  }
  const int tiles = ws.lists[0].tiles + (ws.shared_lists ? 0 : ws.lists[1].tiles);
  lists_kernel<<<tiles, kListThreads, 0, stream>>>(ws);
  const int items = ws.lists[0].tiles + ws.lists[1].tiles;
  plan_kernel<<<1, kListThreads, 4 * items * sizeof(int), stream>>>(ws, grid, p.output != WgradOutput::kFp32Accumulate);
  // Not gated, the products share lists but not blocks: the second product's blocks hold h.
  unpack_kernel<<<grid * 8, kUnpackThreads, 0, stream>>>(
      p.mask, reinterpret_cast<const uint16_t*>(p.offset), p.row_ptr,
      static_cast<const uint16_t*>(p.gated ? p.dg : nullptr), static_cast<const uint16_t*>(p.du), static_cast<const uint16_t*>(p.h), ws);
  return cudaGetLastError();
}

}  // namespace megasparse
