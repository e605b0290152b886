// Asynchronous copies of Hopper: 16-byte cp.async for gathered rows, bulk copies, tensor (TMA) copies. sm_90a only.
#pragma once

#include <cstdint>
#include <cuda.h>

#include "mbarrier.cuh"

namespace megasparse::hopper {

// L2 eviction hints of the bulk and tensor copies (cp.async and ld take policies made by createpolicy only).
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

// Byte offset of 16-byte chunk `chunk` (0..7) of row `row` in a tile of 128-byte rows in the 128-byte swizzle that TMA
// (SWIZZLE_128B) writes and wgmma descriptors read. The tile starts on a multiple of 1024 bytes.
__device__ __forceinline__ uint32_t swizzle128(uint32_t row, uint32_t chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// Copies 16 bytes. Many in a row run only as fast as their address registers are free: keep each source in its own.
__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* src) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(smem), "l"(src) : "memory");
}
// Copies 16 bytes, or writes 16 zero bytes if not `valid` (`src` must be an address that could be read all the same).
__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem), "l"(src), "r"(valid ? 16 : 0)
               : "memory");
}

// Returns when all earlier cp.async of this thread have landed.
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Contiguous copy global -> shared; completes `bytes` (multiple of 16, 16-byte aligned ends) on `bar`.
__device__ __forceinline__ void bulk_load(void* smem, const void* src, uint32_t bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   smem_addr(smem)),
               "l"(src), "r"(bytes), "r"(smem_addr(bar))
               : "memory");
}

__device__ __forceinline__ void tma_prefetch_descriptor(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Box at (x, y, z): x counts elements of the contiguous dimension.
__device__ __forceinline__ void tma_load_3d(void* smem, const CUtensorMap* map, int x, int y, int z, uint64_t* bar,
                                            uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(smem_addr(smem)),
      "l"(map), "r"(smem_addr(bar)), "r"(x), "r"(y), "r"(z), "l"(policy)
      : "memory");
}
// Box of a 5-dimensional map at (x, 0, 0, 0, y).
__device__ __forceinline__ void tma_load_5d_multicast(void* smem, const CUtensorMap* map, int x, int y, uint64_t* bar,
                                                      uint16_t cta_mask, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
      " [%0], [%1, {%3, %7, %7, %7, %4}], [%2], %5, %6;" ::"r"(smem_addr(smem)),
      "l"(map), "r"(smem_addr(bar)), "r"(x), "r"(y), "h"(cta_mask), "l"(policy), "r"(0)
      : "memory");
}

}  // namespace megasparse::hopper
