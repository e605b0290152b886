// bf16 pairs in 32-bit words: conversion and the bit masks of their non-zeros.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>

namespace megasparse::hopper {

// Word = {low half: first element, high half: second}. Round to nearest even.
__device__ __forceinline__ uint32_t pack_bf16(float first, float second) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
// max(., 0) before rounding; NaN stays NaN.
__device__ __forceinline__ uint32_t pack_relu_bf16(float first, float second) {
  uint32_t word;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
__device__ __forceinline__ float bf16_first(uint32_t word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float bf16_second(uint32_t word) { return __uint_as_float(word & 0xFFFF0000u); }

// bf16(a * b) of both elements.
__device__ __forceinline__ uint32_t mul_bf16(uint32_t a, uint32_t b) {
  uint32_t word;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}

// 0xFFFF in each half whose element is not zero (NaN is not, -0 is zero).
__device__ __forceinline__ uint32_t nonzero_halves(uint32_t word) {
  uint32_t mask;
  asm("set.neu.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(word), "r"(0u));
  return mask;
}
// Sign of each element as bf16: -1, 0 or 1 (NaN: +-1).
__device__ __forceinline__ uint32_t sign_bf16(uint32_t word) {
  return (nonzero_halves(word) & 0x3F803F80u) | (word & 0x80008000u);
}

// Bit k (0..15) set iff element k of the 8 words is not zero, from the words' nonzero_halves.
__device__ __forceinline__ uint32_t nonzero_bits(const uint32_t (&halves)[8]) {
  uint32_t bytes[4];  // bytes[i] = one byte, 0x00 or 0xFF, for each of elements 4 i .. 4 i + 3
#pragma unroll
  for (int i = 0; i < 4; ++i) bytes[i] = __byte_perm(halves[2 * i], halves[2 * i + 1], 0x6420);
  // One distinct bit of each element, byte by byte; the product's top byte adds up the four bytes.
  const uint32_t low = ((bytes[0] & 0x08040201u) | (bytes[1] & 0x80402010u)) * 0x01010101u;
  const uint32_t high = ((bytes[2] & 0x08040201u) | (bytes[3] & 0x80402010u)) * 0x01010101u;
  return __byte_perm(low, high, 0x4473) & 0xFFFFu;
}

// Exclusive sum over the lower lanes of each group of four.
__device__ __forceinline__ uint32_t quad_exclusive_sum(uint32_t value, uint32_t quad_lane) {
  uint32_t sum = value;
  uint32_t other = __shfl_up_sync(0xFFFFFFFFu, sum, 1, 4);
  if (quad_lane >= 1) sum += other;
  other = __shfl_up_sync(0xFFFFFFFFu, sum, 2, 4);
  if (quad_lane >= 2) sum += other;
  return sum - value;
}

}  // namespace megasparse::hopper
