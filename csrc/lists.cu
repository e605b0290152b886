// Offsets, unions and scans of a mask of active positions. All of it is integer work on 1/16 of the bytes of a dense
// bf16 activation: bound by latency, so few kernels with one CTA per token tile.
#include "megasparse/lists.h"

namespace megasparse {
namespace {

constexpr int kTokenTile = 128;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kRowsPerWarp = kTokenTile / kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int popcount(uint64_t word) { return __popcll(static_cast<long long>(word)); }

__device__ __forceinline__ uint64_t below(int bit) { return (uint64_t{1} << bit) - 1; }

__device__ __forceinline__ int warp_inclusive_sum(int value) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

// scratch: active positions per row [Mp], then per tile: active, active of counted tokens, counted tokens [Mt each].
// counted_words: as union_words, of counted tokens only.
__global__ void __launch_bounds__(kThreads) tile_kernel(const ListsParams p, int words) {
  extern __shared__ uint64_t shared[];
  uint64_t* const union_s = shared;          // OR over the tile's rows
  uint64_t* const counted_s = shared + words;  // OR over its counted rows
  int* const column_s = reinterpret_cast<int*>(shared + 2 * words);  // union columns before each word
  __shared__ int sums[3];
  const int tile = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int tiles = gridDim.x;
  for (int w = threadIdx.x; w < 2 * words; w += kThreads) shared[w] = 0;
  if (threadIdx.x < 3) sums[threadIdx.x] = 0;
  __syncthreads();

  const int64_t first_row = int64_t{tile} * kTokenTile + warp * kRowsPerWarp;
  unsigned counted = 0;  // bit i: row i of this warp counts
#pragma unroll
  for (int i = 0; i < kRowsPerWarp; ++i) {
    const bool inside = first_row + i < p.m;
    if (inside && (p.token_mask == nullptr || p.token_mask[first_row + i])) counted |= 1u << i;
  }
  int row_sum[kRowsPerWarp] = {};
  for (int chunk = 0; chunk < words; chunk += 32) {
    const int w = chunk + lane;
    uint64_t word[kRowsPerWarp];
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) word[i] = w < words ? p.mask[(first_row + i) * words + w] : 0;
    uint64_t all = 0, all_counted = 0;
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) {
      all |= word[i];
      if (counted >> i & 1) all_counted |= word[i];
      const int bits = popcount(word[i]);
      const int inclusive = warp_inclusive_sum(bits);
      if (w < words) p.offset[(first_row + i) * words + w] = static_cast<uint16_t>(row_sum[i] + inclusive - bits);
      row_sum[i] += __shfl_sync(kAllLanes, inclusive, 31);
    }
    if (w < words) {
      atomicOr(reinterpret_cast<unsigned long long*>(union_s + w), all);
      atomicOr(reinterpret_cast<unsigned long long*>(counted_s + w), all_counted);
    }
  }
  if (lane == 0) {
    int active = 0, active_counted = 0;
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) {
      p.scratch[first_row + i] = row_sum[i];
      active += row_sum[i];
      if (counted >> i & 1) active_counted += row_sum[i];
    }
    atomicAdd(sums + 0, active);
    atomicAdd(sums + 1, active_counted);
    atomicAdd(sums + 2, __popc(counted));
  }
  __syncthreads();

  if (warp == 0) {
    int before = 0;
    for (int chunk = 0; chunk < words; chunk += 32) {
      const int w = chunk + lane;
      const int bits = w < words ? popcount(union_s[w]) : 0;
      const int inclusive = warp_inclusive_sum(bits);
      if (w < words) column_s[w] = before + inclusive - bits;
      before += __shfl_sync(kAllLanes, inclusive, 31);
    }
    int32_t* const index = p.union_index + int64_t{tile} * words * 64;
    for (int column = before + lane; column < (before + 63) / 64 * 64; column += 32) index[column] = -1;
    if (lane == 0) {
      const int64_t padded_tokens = int64_t{tiles} * kTokenTile;
      p.tile_info[kUnionCount * (tiles + 1) + tile] = before;
#pragma unroll
      for (int i = 0; i < 3; ++i) p.scratch[padded_tokens + int64_t{i} * tiles + tile] = sums[i];
    }
  }
  __syncthreads();

  for (int w = warp; w < words; w += kWarps) {
    const uint64_t word = union_s[w];
    if (lane == 0) {
      p.union_words[int64_t{tile} * words + w] = word;
      p.counted_words[int64_t{tile} * words + w] = counted_s[w];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int bit = lane + 32 * half;
      if (word >> bit & 1) {
        const int position = w * 64 + bit;
        p.union_index[int64_t{tile} * words * 64 + column_s[w] + popcount(word & below(bit))] = position;
      }
    }
  }
}

__device__ __forceinline__ int64_t block_sum(int64_t value, int64_t* shared) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int step = kTokenTile / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) shared[threadIdx.x] += shared[threadIdx.x + step];
    __syncthreads();
  }
  const int64_t sum = shared[0];
  __syncthreads();
  return sum;
}

// tile_counts and fired of the 64 neurons of one position tile; two threads a neuron, half of the token tiles each.
__device__ void count_neurons(const ListsParams& p, int word, int words, int tiles, int64_t* shared) {
  const int bit = threadIdx.x & 63, half = threadIdx.x / 64;
  int count = 0, counted = 0;
#pragma unroll 8
  for (int tile = half; tile < tiles; tile += 2) {
    count += static_cast<int>(p.union_words[int64_t{tile} * words + word] >> bit & 1);
    counted |= static_cast<int>(p.counted_words[int64_t{tile} * words + word] >> bit & 1);
  }
  shared[threadIdx.x] = int64_t{count} * 2 + counted;
  __syncthreads();
  const int position = word * 64 + bit;
  if (half == 0 && position < p.h_size) {
    const int neuron = p.order != nullptr ? p.order[position] : position;
    const int64_t a = shared[threadIdx.x], b = shared[threadIdx.x + 64];
    p.tile_counts[neuron] = static_cast<int32_t>(a / 2 + b / 2);
    p.fired[neuron] = ((a | b) & 1) != 0;
  }
}

// One CTA per token tile, then one per position tile (count_neurons). Every CTA of a token tile sums what lies before
// its tile: Mt^2 reads in all, which at Mt = 1024 is still only 16 MB from L2.
__global__ void __launch_bounds__(kTokenTile, 4) scan_kernel(const ListsParams p, int tiles, int words) {
  __shared__ int64_t shared[kTokenTile];
  __shared__ int warp_sum[kTokenTile / 32];
  if (blockIdx.x >= tiles) return count_neurons(p, blockIdx.x - tiles, words, tiles, shared);
  const int tile = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int64_t padded_tokens = int64_t{tiles} * kTokenTile;
  int32_t* const count = p.tile_info + kUnionCount * (tiles + 1);
  const int32_t* const active = p.scratch + padded_tokens;
  const int own = count[tile];
  int64_t before = 0, blocks = 0, rank = 0;
  for (int t = threadIdx.x; t < tiles; t += kTokenTile) {
    const int other = count[t];
    if (t < tile) {
      before += active[t];
      blocks += (other + 63) / 64;
    }
    rank += other > own || (other == own && t < tile);
  }
  before = block_sum(before, shared);
  blocks = block_sum(blocks, shared);
  rank = block_sum(rank, shared);
  const int64_t row = int64_t{tile} * kTokenTile + threadIdx.x;
  const int bits = p.scratch[row];
  const int inclusive = warp_inclusive_sum(bits);
  if (lane == 31) warp_sum[warp] = inclusive;
  __syncthreads();
  int64_t end = before + inclusive;
  for (int i = 0; i < warp; ++i) end += warp_sum[i];
  p.row_ptr[row] = end - bits;
  if (row == padded_tokens - 1) p.row_ptr[padded_tokens] = end;
  if (threadIdx.x == 0) {
    p.tile_info[kBlockPtr * (tiles + 1) + tile] = static_cast<int32_t>(blocks);
    p.tile_info[kTileOrder * (tiles + 1) + rank] = tile;
    if (tile == tiles - 1) {
      p.tile_info[kBlockPtr * (tiles + 1) + tiles] = static_cast<int32_t>(blocks + (own + 63) / 64);
      count[tiles] = 0;
      p.tile_info[kTileOrder * (tiles + 1) + tiles] = 0;
    }
  }
  if (tile == 0) {
    int64_t sums[3] = {};
    for (int t = threadIdx.x; t < tiles; t += kTokenTile) {
      sums[0] += p.scratch[padded_tokens + 2 * int64_t{tiles} + t];
      sums[1] += p.scratch[padded_tokens + int64_t{tiles} + t];
      sums[2] += count[t];
    }
    for (int i = 0; i < 3; ++i) {
      const int64_t sum = block_sum(sums[i], shared);
      if (threadIdx.x == 0) p.counts[i] = sum;
    }
    if (threadIdx.x == 0) p.counts[3] = tiles;
  }
}

__global__ void overflow_flags_kernel(const int64_t* row_ptr_end, int64_t capacity, int32_t* flags) {
  const bool overflow = *row_ptr_end > capacity;
  flags[0] = overflow;
  flags[1] = !overflow;
}

constexpr int kSumThreads = 1024;

__global__ void __launch_bounds__(kSumThreads) sum_kernel(const float* values, const int32_t* count, int scale,
                                                         float* out) {
  __shared__ float shared[kSumThreads];
  float sum = 0.f;
  for (int i = threadIdx.x; i < *count * scale; i += kSumThreads) sum += values[i];
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int step = kSumThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) shared[threadIdx.x] += shared[threadIdx.x + step];
    __syncthreads();
  }
  if (threadIdx.x == 0) *out = shared[0];
}

}  // namespace

cudaError_t launch_lists(const ListsParams& p, cudaStream_t stream) {
  const int tiles = static_cast<int>((p.m + kTokenTile - 1) / kTokenTile);
  const int words = static_cast<int>((p.h_size + 63) / 64);
  const int bytes = words * (2 * sizeof(uint64_t) + sizeof(int));
  if (p.h_size < 1 || p.h_size > 65536 || p.m < 1) return cudaErrorInvalidValue;
  tile_kernel<<<tiles, kThreads, bytes, stream>>>(p, words);
  scan_kernel<<<tiles + words, kTokenTile, 0, stream>>>(p, tiles, words);
  return cudaGetLastError();
}

cudaError_t launch_overflow_flags(const int64_t* row_ptr_end, int64_t capacity, int32_t* flags, cudaStream_t stream) {
  overflow_flags_kernel<<<1, 1, 0, stream>>>(row_ptr_end, capacity, flags);
  return cudaGetLastError();
}

cudaError_t launch_sum(const float* values, const int32_t* count, int scale, float* out, cudaStream_t stream) {
  sum_kernel<<<1, kSumThreads, 0, stream>>>(values, count, scale, out);
  return cudaGetLastError();
}

}  // namespace megasparse
