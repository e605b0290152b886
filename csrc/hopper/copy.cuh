// Asynchronous copies of Hopper: 16-byte cp.async for gathered rows, bulk copies, tensor (TMA) copies. sm_90a only.
#pragma once

#include <cstdint>
#include <cuda.h>

#include "mbarrier.cuh"

namespace megasparse::hopper {

// L2 eviction hints of the bulk and tensor copies (cp.async and ld take policies made by createpolicy only).
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
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

// Contiguous copy global -> shared; completes `bytes` (multiple of 16, 16-byte aligned ends) on `bar`.
__device__ __forceinline__ void bulk_load(void* smem, const void* src, uint32_t bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   smem_addr(smem)),
               "l"(src), "r"(bytes), "r"(smem_addr(bar))
               : "memory");
}
__device__ __forceinline__ void bulk_load(void* smem, const void* src, uint32_t bytes, uint64_t* bar, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          smem_addr(smem)),
      "l"(src), "r"(bytes), "r"(smem_addr(bar)), "l"(policy)
      : "memory");
}
// The same into every CTA of `cta_mask`, at the same shared-memory offset, signalling each one's own barrier.
__device__ __forceinline__ void bulk_load_multicast(void* smem, const void* src, uint32_t bytes, uint64_t* bar,
                                                    uint16_t cta_mask) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::
          "r"(smem_addr(smem)),
      "l"(src), "r"(bytes), "r"(smem_addr(bar)), "h"(cta_mask)
      : "memory");
}

// Contiguous copy shared -> global. Order: ordinary stores, fence_async_proxy, barrier, bulk_store, bulk_commit. The
// thread that committed waits: bulk_wait_read before the shared memory may change.
__device__ __forceinline__ void bulk_store(void* dst, const void* smem, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(smem_addr(smem)), "r"(bytes)
               : "memory");
}
// dst[i] += smem[i] over fp32 elements, in the L2.
__device__ __forceinline__ void bulk_reduce_add_f32(void* dst, const void* smem, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst),
               "r"(smem_addr(smem)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
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
__device__ __forceinline__ void tma_load_2d_multicast(void* smem, const CUtensorMap* map, int x, int y, uint64_t* bar,
                                                      uint16_t cta_mask, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(smem_addr(smem)),
      "l"(map), "r"(smem_addr(bar)), "r"(x), "r"(y), "h"(cta_mask), "l"(policy)
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
