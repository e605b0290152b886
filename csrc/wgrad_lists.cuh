// Work lists of the weight gradients: which tokens each tile of neurons needs, and how the tiles are shared out.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

#include "megasparse/wgrad.h"
#include "token_rows.h"

namespace megasparse {

// A share of one tile's tokens. K = 64 tokens a step.
struct alignas(16) WgradJob {
  int32_t product;  // 0: dw_in, 1: dw_down
  int32_t tile;     // negative: no more work
  int32_t first;    // first k-step
  int32_t ksteps;
  int32_t chunk;    // of `chunks` jobs that share the tile's tokens
  int32_t chunks;
  int32_t partial;  // chunks > 1: index of chunk 0's first partial tile (one a column tile); the others follow
  int32_t column;   // filled in when claimed
};

// Device scratch of one launch. Tile i of a product: its tokens at tokens[i * mp], ascending, padded with -1 to a multiple
// of 64, and their rows of x and dy at rows[i * mp], likewise; its operand A at blocks + i * (mp / 64), one 16 KB block per
// 64 tokens: [2 halves][64 tokens][64 positions] bf16, the 128-byte swizzled image that wgmma reads M-major, zeros where
// inactive or padded.
struct WgradLists {
  int32_t* tokens;
  int32_t* rows;  // `tokens` itself where there is one sequence
  uint8_t* blocks;
  int32_t* ksteps;  // [tiles]
  int tiles;
  int subs;  // 64-position tiles in a tile of this product: 1 (gated dw_in) or 2
};

struct WgradWorkspace {
  uint32_t* bits;  // [W, mp / 32] bit t % 32 of word t / 32: token t is active in tile w
  WgradLists lists[2];
  WgradJob* jobs;
  int32_t* state;     // [0] units, [1] work counter, [2] blocks, [kArrivalsBegin...] arrival counters of split tiles
  int32_t* first_block;  // [tiles of both products] blocks of the tiles before
  int32_t* block_item;   // [blocks] tile of either product (the second's after the first's) that a block belongs to
  float* partials;    // fp32 tiles of kTileM x kTileN
  TokenRows token_rows;  // of x and dy
  int64_t mp;
  int words;          // W
  bool shared_lists;  // both products have the same tiles (not gated)
  int columns;        // ceil(D / 256)
  int max_partials;
};

constexpr int kArrivalsBegin = 8;
constexpr int kWgradBlockBytes = 16384;

cudaError_t launch_wgrad_lists(const WgradParams& params, const WgradWorkspace& workspace, int grid,
                               cudaStream_t stream);

}  // namespace megasparse
