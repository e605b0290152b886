// Register-to-memory helpers of epilogues. sm_90a only.
#pragma once

#include <cstdint>

namespace megasparse::hopper {

// Stores four 8x8 matrices of 16-bit elements, each in the layout of a wgmma accumulator (two columns a register).
// Lanes 8 i .. 8 i + 7 give the shared addresses of matrix i's rows (16 bytes each).
__device__ __forceinline__ void stmatrix_x4(uint32_t row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m0), "r"(m1), "r"(m2),
               "r"(m3)
               : "memory");
}

// address[0] += a, address[1] += b in L2; nothing returns. Deterministic where every element gets one addition.
__device__ __forceinline__ void red_add_f32x2(float* address, float a, float b) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(a), "f"(b) : "memory");
}

}  // namespace megasparse::hopper
