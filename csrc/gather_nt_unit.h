// Work units of the gathered products, as the plan lists them.
#pragma once

namespace megasparse {

constexpr int kUnitTokens = 128;   // of a token tile
constexpr int kUnitBlock = 64;     // union columns of a compact block
constexpr int kUnitMaxBlocks = 3;  // blocks of a unit
constexpr int kPlanHeader = 4;     // int32 words before the units; the first is their number

// A CTA's piece of work.
struct Unit {
  int tile;
  int first;          // first block within the tile
  int blocks;         // 1 .. kMaxBlocks
  int compact_block;  // index of the first block in the compact buffers
};
static_assert(sizeof(Unit) == 16);

}  // namespace megasparse
