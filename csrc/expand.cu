// Packed values -> compact blocks: for each token tile, the columns of its union, 64 at a time, as [128 tokens][64]
// bf16 in the shared-memory image that wgmma reads (SW128, K-major), so that the products over a union load them by
// plain bulk copies. One CTA builds one block: zeroed in shared memory, non-zeros scattered, written out coalesced.
// Bound by writing the blocks (2 U bytes a token), most of which stay in L2 for the product that follows.
#include <cuda_bf16.h>

#include "megasparse/lists.h"

namespace megasparse {
namespace {

constexpr int kTokenTile = 128;
constexpr int kColumns = 64;
constexpr int kBlockElements = kTokenTile * kColumns;
constexpr int kVectors = kBlockElements / 8;  // of 16 bytes
constexpr int kMaxGridColumns = 64;

__device__ __forceinline__ int popcount(uint64_t word) { return __popcll(static_cast<long long>(word)); }

__device__ __forceinline__ uint64_t below(int bit) { return (uint64_t{1} << bit) - 1; }

// Element (row, column) of a block in its SW128 K-major image: 16-byte piece c of a row lies at piece c ^ (row % 8).
__device__ __forceinline__ int image_index(int row, int column) {
  return row * kColumns + (((column >> 3) ^ (row & 7)) << 3) + (column & 7);
}

template <int kSources, bool kFromSlots>
__global__ void __launch_bounds__(kTokenTile, 4) expand_kernel(const ExpandParams p, int words, int tiles) {
  __shared__ uint4 image[kSources][kVectors];
  __shared__ float l1_rows[kTokenTile];
  if (p.run_if != nullptr && *p.run_if == 0) return;
  const int tile = blockIdx.y, row = threadIdx.x;
  const int union_count = p.tile_info[kUnionCount * (tiles + 1) + tile];
  const int first_block = p.tile_info[kBlockPtr * (tiles + 1) + tile];
  const int32_t* const index = p.union_index + int64_t{tile} * words * 64;
  const int64_t token = int64_t{tile} * kTokenTile + row;
  const uint64_t* const row_mask = p.mask + token * words;
  const int64_t row_start = p.row_ptr[token];
  const bool counts = p.l1_partial != nullptr && token < p.m && (p.token_mask == nullptr || p.token_mask[token]);

  for (int block = blockIdx.x; block * kColumns < union_count; block += gridDim.x) {
#pragma unroll
    for (int s = 0; s < kSources; ++s)
#pragma unroll
      for (int i = 0; i < kVectors / kTokenTile; ++i) image[s][i * kTokenTile + row] = make_uint4(0, 0, 0, 0);
    __syncthreads();

    const int first = index[block * kColumns];
    const int last = index[min(block * kColumns + kColumns, union_count) - 1];
    int column = 0;
    float l1 = 0.f;
    for (int w = first / 64; w <= last / 64; ++w) {
      uint64_t range = ~uint64_t{0};  // positions of this word that belong to this block
      if (w == first / 64) range &= ~below(first % 64);
      if (w == last / 64) range &= below(last % 64) | (uint64_t{1} << (last % 64));
      const uint64_t mask = row_mask[w];
      const uint64_t united = p.union_words[int64_t{tile} * words + w] & range;
      const int offset = p.offset[token * words + w];
      if (w == first / 64) {
        p.base[int64_t{first_block + block} * kTokenTile + row] =
            static_cast<uint16_t>(offset + popcount(mask & below(first % 64)));
      }
      const int64_t packed_start = row_start + offset;
      const int64_t start = kFromSlots ? token * words * 64 + w * 64 : packed_start;
      for (uint64_t rest = mask & range; rest != 0; rest &= rest - 1) {
        const int bit = __ffsll(static_cast<long long>(rest)) - 1;
        const int rank = popcount(mask & below(bit));
        const int place = image_index(row, column + popcount(united & below(bit)));
#pragma unroll
        for (int s = 0; s < kSources; ++s) {
          const auto* source = static_cast<const __nv_bfloat16*>(kFromSlots ? p.slots : p.packed[s]);
          const __nv_bfloat16 value = source[start + rank];
          reinterpret_cast<__nv_bfloat16*>(image[s])[place] = value;
          if (kFromSlots && s == 0) {
            l1 += fabsf(__bfloat162float(value));
            if (p.packed_out != nullptr && packed_start + rank < p.packed_capacity)
              static_cast<__nv_bfloat16*>(p.packed_out)[packed_start + rank] = value;
          }
        }
      }
      column += popcount(united);
    }
    if (p.l1_partial != nullptr) l1_rows[row] = counts ? l1 : 0.f;
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSources; ++s) {
      uint4* const out = static_cast<uint4*>(p.compact[s]) + int64_t{first_block + block} * kVectors;
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
