// From the mask of active positions: offsets, unions, scans, statistics (launch_lists); from values in rows to compact
// blocks (launch_expand); sums in a fixed order (launch_sum). Sizes as in csrc/README.md: Mt = ceil(M / 128) token
// tiles, Mp = 128 Mt, W = ceil(H / 64) position tiles, Hp = 64 W.
#pragma once

#include <cstdint>
#include <cuda_runtime_api.h>

namespace megasparse {

// tile_info is int32 [3, Mt + 1]: its rows.
enum TileInfo : int {
  kUnionCount = 0,  // [t] size U of the union of tile t
  kBlockPtr = 1,    // [t] exclusive sum of ceil(U / 64): first compact block of tile t
  kTileOrder = 2,   // [i] tiles by descending U, ties by index
};

struct ListsParams {
  const uint64_t* mask;       // [Mp, W]
  const int32_t* order;       // [H] position -> neuron, or null for the identity
  const bool* token_mask;     // [M], or null: all tokens count
  uint16_t* offset;           // out [Mp, W]: active positions of the row before this word
  int64_t* row_ptr;           // out [Mp + 1]: active positions of all rows before this one
  uint64_t* union_words;      // out [Mt, W]: OR of the rows' words
  int32_t* union_index;       // out [Mt, Hp]: the union's positions, ascending, -1 up to a multiple of 64
  int32_t* tile_info;         // out [3, Mt + 1]
  int64_t* counts;            // out [4]: counted tokens, active (counted tokens), sum of U, Mt
  bool* fired;                // out [H], by neuron: active for some counted token
  int32_t* tile_counts;       // out [H], by neuron: token tiles whose union has it
  uint64_t* counted_words;    // scratch [Mt, W]
  int32_t* scratch;           // [Mp + 3 Mt]
  int64_t m;
  int64_t h_size;             // H <= 65536
};

cudaError_t launch_lists(const ListsParams& params, cudaStream_t stream);

// Where the values of row t, word w start: slot layout (one slot of 64 per word, as the gate product writes them) or
// packed at row_ptr[t] + offset[t, w].
struct ExpandParams {
  const uint64_t* mask;
  const uint16_t* offset;
  const int64_t* row_ptr;
  const uint64_t* union_words;
  const int32_t* union_index;
  const int32_t* tile_info;
  const void* slots;          // bf16 [Mp, Hp], or null: read packed
  const void* packed[2];      // bf16; the second may be null
  void* compact[2];           // out: bf16 blocks [128][64] in their SW128 K-major image; second null with packed[1]
  uint16_t* base;             // out [blocks, 128]: active positions of the row before the block
  void* packed_out;           // out: bf16 packed copy of `slots`, or null
  int64_t packed_capacity;    // values beyond it are not written to packed_out
  float* l1_partial;          // out, per block: sum of |value| over counted tokens; or null
  const bool* token_mask;     // used with l1_partial
  const int32_t* run_if;      // null, or: does nothing where *run_if is 0
  int64_t m;
  int64_t h_size;
};

cudaError_t launch_expand(const ExpandParams& params, cudaStream_t stream);

// flags[0] = row_ptr[Mp] > capacity, flags[1] = the opposite.
cudaError_t launch_overflow_flags(const int64_t* row_ptr_end, int64_t capacity, int32_t* flags, cudaStream_t stream);

// *out = values[0] + ... + values[*count * scale - 1], always in the same order. count is on the device.
cudaError_t launch_sum(const float* values, const int32_t* count, int scale, float* out, cudaStream_t stream);

}  // namespace megasparse
