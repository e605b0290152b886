// Packed values -> compact blocks: for each token tile, the columns of its union, 64 at a time, as [128 tokens][64]
// bf16 in the shared-memory image that wgmma reads (SW128, K-major), so that the products over a union load them by
// plain bulk copies.
//
// One CTA of 128 makes a block in shared memory: zeroes it, then each thread scatters the values of one row, then all
// write it out 16 bytes a thread. Work goes with the non-zeros, not with the columns. Bound by writing the blocks (2 U
// bytes a token), most of which stay in L2 for the product that follows; latency is hidden by several CTAs per SM and by
// fetching the masks of four words and four values at a time.
#include <cuda_bf16.h>

#include "megasparse/lists.h"

namespace megasparse {
namespace {

constexpr int kTokenTile = 128;
constexpr int kColumns = 64;
constexpr int kVectors = kTokenTile * kColumns / 8;  // of 16 bytes
constexpr int kMaxGridColumns = 64;
constexpr int kWordsAhead = 4;
constexpr int kValuesAhead = 4;

__device__ __forceinline__ int popcount(uint64_t word) { return __popcll(static_cast<long long>(word)); }

__device__ __forceinline__ uint64_t below(int bit) { return (uint64_t{1} << bit) - 1; }

__device__ __forceinline__ uint64_t load(const uint64_t* word) {
  return __ldg(reinterpret_cast<const unsigned long long*>(word));
}

// Element (row, column) of a block in its SW128 K-major image: 16-byte piece c of a row lies at piece c ^ (row % 8).
__device__ __forceinline__ int image_index(int row, int column) {
  return row * kColumns + (((column >> 3) ^ (row & 7)) << 3) + (column & 7);
}

template <int kSources, bool kFromSlots>
__global__ void __launch_bounds__(kTokenTile, 8) expand_kernel(const ExpandParams p, int words, int tiles) {
  __shared__ uint4 image[kSources][kVectors];
  __shared__ uint64_t mask_s[kTokenTile][kWordsAhead];
  __shared__ float l1_rows[kTokenTile];
  if (p.run_if != nullptr && *p.run_if == 0) return;
  const int tile = blockIdx.y, row = threadIdx.x;
  const int union_count = p.tile_info[kUnionCount * (tiles + 1) + tile];
  const int64_t first_block = p.tile_info[kBlockPtr * (tiles + 1) + tile];
  const int32_t* const index = p.union_index + int64_t{tile} * words * 64;
  const int64_t token = int64_t{tile} * kTokenTile + row;
  // Staging masks: four neighbouring threads fetch four neighbouring words of a row, which is one access to memory.
  const int stage_row = threadIdx.x / kWordsAhead, stage_word = threadIdx.x % kWordsAhead;
  const uint64_t* const stage_mask = p.mask + (int64_t{tile} * kTokenTile + stage_row) * words + stage_word;
  const uint64_t* const unions = p.union_words + int64_t{tile} * words;
  const int64_t row_start = p.row_ptr[token];
  const bool counts = p.l1_partial != nullptr && token < p.m && (p.token_mask == nullptr || p.token_mask[token]);

  for (int block = blockIdx.x; block * kColumns < union_count; block += gridDim.x) {
    const int first = index[block * kColumns];
    const int last = index[min(block * kColumns + kColumns, union_count) - 1];
    const int first_word = first / 64, last_word = last / 64;
#pragma unroll
    for (int s = 0; s < kSources; ++s)
#pragma unroll
      for (int i = 0; i < kVectors / kTokenTile; ++i) image[s][i * kTokenTile + row] = make_uint4(0, 0, 0, 0);

    int skipped = 0;  // active positions of the first word that belong to an earlier block
    int64_t packed = row_start + p.offset[token * words + first_word];  // where the next value lies, or goes
    int column = 0;                                                     // of the block, where the next word starts
    float l1 = 0.f;

    for (int group = first_word; group <= last_word; group += kWordsAhead) {
      uint64_t masks[kWordsAhead], united[kWordsAhead];
#pragma unroll
      for (int i = 0; i < kWordsAhead; ++i) {
        constexpr int kRows = kTokenTile / kWordsAhead;
        mask_s[i * kRows + stage_row][stage_word] =
            group + stage_word <= last_word ? load(stage_mask + int64_t{i} * kRows * words + group) : 0;
        united[i] = group + i <= last_word ? load(unions + group + i) : 0;
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kWordsAhead; ++i) masks[i] = mask_s[row][i];
      __syncthreads();
      if (group == first_word) {
        skipped = popcount(masks[0] & below(first % 64));
        packed += skipped;
        p.base[(first_block + block) * kTokenTile + row] = static_cast<uint16_t>(packed - row_start);
      }
#pragma unroll
      for (int i = 0; i < kWordsAhead; ++i) {
        const int word = group + i;
        uint64_t range = ~uint64_t{0};  // positions of this word that belong to this block
        if (word == first_word) range &= ~below(first % 64);
        if (word == last_word) range &= below(last % 64) | (uint64_t{1} << (last % 64));
        united[i] &= range;
        uint64_t active = masks[i] & range;
        const __nv_bfloat16* source[kSources];
#pragma unroll
        for (int s = 0; s < kSources; ++s) {
          source[s] = kFromSlots ? static_cast<const __nv_bfloat16*>(p.slots) + (token * words + word) * 64 +
                                       (word == first_word ? skipped : 0)
                                 : static_cast<const __nv_bfloat16*>(p.packed[s]) + packed;
        }
        for (int done = 0, count = popcount(active); done < count; done += kValuesAhead) {
          __nv_bfloat16 values[kSources][kValuesAhead];
#pragma unroll
          for (int s = 0; s < kSources; ++s)
#pragma unroll
            for (int j = 0; j < kValuesAhead; ++j) {
              if (done + j < count) values[s][j] = __ldg(source[s] + done + j);
            }
#pragma unroll
          for (int j = 0; j < kValuesAhead; ++j) {
            if (done + j < count) {
              const uint64_t lowest = active & (~active + 1);
              active ^= lowest;
              const int place = image_index(row, column + popcount(united[i] & (lowest - 1)));
#pragma unroll
              for (int s = 0; s < kSources; ++s) reinterpret_cast<__nv_bfloat16*>(image[s])[place] = values[s][j];
              if (kFromSlots) {
                l1 += fabsf(__bfloat162float(values[0][j]));
                const int64_t out = packed + done + j;
                if (p.packed_out != nullptr && out < p.packed_capacity)
                  static_cast<__nv_bfloat16*>(p.packed_out)[out] = values[0][j];
              }
            }
          }
        }
        packed += popcount(masks[i] & range);
        column += popcount(united[i]);
      }
    }
    if (p.l1_partial != nullptr) l1_rows[row] = counts ? l1 : 0.f;
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSources; ++s) {
      uint4* const out = static_cast<uint4*>(p.compact[s]) + (first_block + block) * kVectors;
#pragma unroll
      for (int i = 0; i < kVectors / kTokenTile; ++i) out[i * kTokenTile + row] = image[s][i * kTokenTile + row];
    }
    if (p.l1_partial != nullptr) {
      for (int step = kTokenTile / 2; step > 0; step /= 2) {
        if (row < step) l1_rows[row] += l1_rows[row + step];
        __syncthreads();
      }
      if (row == 0) p.l1_partial[first_block + block] = l1_rows[0];
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t launch_expand(const ExpandParams& p, cudaStream_t stream) {
  const int tiles = static_cast<int>((p.m + kTokenTile - 1) / kTokenTile);
  const int words = static_cast<int>((p.h_size + 63) / 64);
  if (tiles < 1 || tiles > 65535 || words < 1) return cudaErrorInvalidValue;
  const dim3 grid(words < kMaxGridColumns ? words : kMaxGridColumns, tiles);
  if (p.slots != nullptr) {
    expand_kernel<1, true><<<grid, kTokenTile, 0, stream>>>(p, words, tiles);
  } else if (p.packed[1] != nullptr) {
    expand_kernel<2, false><<<grid, kTokenTile, 0, stream>>>(p, words, tiles);
  } else {
    expand_kernel<1, false><<<grid, kTokenTile, 0, stream>>>(p, words, tiles);
  }
  return cudaGetLastError();
}

}  // namespace megasparse
