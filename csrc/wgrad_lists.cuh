// Work lists of the weight gradients: which tokens each tile of neurons needs, and how the tiles are shared out.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

#include "megasparse/wgrad.h"

namespace megasparse {

// Where one token's values of one 64-position tile lie.
struct alignas(16) TileRow {
  uint32_t low;        // mask of positions 0-31
  uint32_t high;       // 32-63
  uint32_t start;      // index of the first packed value
  uint32_t low_count;  // values of positions 0-31
};

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

// Device scratch of one launch. Lists of a product: tile i's tokens at tokens[i * mp], ascending, padded with -1 to a
// multiple of 64; its rows at rows[(i * subs + sub) * mp], same order, zero mask where padded.
struct WgradLists {
  int32_t* tokens;
  TileRow* rows;
  int32_t* ksteps;  // [tiles]
  int tiles;
  int subs;  // 64-position tiles in a tile of this product: 1 (gated dw_in) or 2
};

struct WgradWorkspace {
  uint32_t* bits;  // [W, mp / 32] bit t % 32 of word t / 32: token t is active in tile w
  WgradLists lists[2];
  WgradJob* jobs;
  int32_t* state;     // [0] units, [1] work counter, [2...] arrival counters of split tiles
  float* partials;    // fp32 tiles of kTileM x kTileN
  int64_t mp;
  int words;          // W
  int columns;        // ceil(D / 256)
  int max_partials;
};

constexpr int kArrivalsBegin = 8;

cudaError_t launch_wgrad_lists(const WgradParams& params, const WgradWorkspace& workspace, int grid, cudaStream_t stream);

}  // namespace megasparse
