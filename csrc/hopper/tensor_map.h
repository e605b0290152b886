// Host side of the tensor copies: descriptors of row-major bf16 matrices.
#pragma once

#include <cstdint>
#include <cuda.h>
#include <cuda_runtime_api.h>

namespace megasparse::hopper {

// cuTensorMapEncodeTiled without linking libcuda; null where the driver has none.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = []() -> decltype(&cuTensorMapEncodeTiled) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) !=
            cudaSuccess ||
        found != cudaDriverEntryPointSuccess) {
      return nullptr;
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

// Tensor map of `rank` dimensions of bf16 elements, contiguous dimension first; strides[i] in bytes is that of dimension
// i + 1. Boxes land in the 128-byte swizzle; elements out of bounds read as zero.
inline cudaError_t make_tensor_map(CUtensorMap* map, const void* base, int rank, const uint64_t* dims,
                                   const uint64_t* strides, const uint32_t* box) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint64_t global_dims[5], global_strides[5];
  cuuint32_t box_dims[5], element_strides[5];
  for (int i = 0; i < rank; ++i) {
    global_dims[i] = dims[i];
    box_dims[i] = box[i];
    element_strides[i] = 1;
    if (i + 1 < rank) global_strides[i] = strides[i];
  }
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, static_cast<cuuint32_t>(rank), const_cast<void*>(base), global_dims,
             global_strides, box_dims, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// [positions, sequences, cols] contiguous as dimensions (cols, sequences, positions), boxes of 64 columns (128 bytes) x
// box_positions positions of one sequence.
inline cudaError_t make_sequences_map(CUtensorMap* map, const void* base, int64_t positions, int64_t sequences, int64_t cols,
                                      uint32_t box_positions) {
  const uint64_t dims[3] = {static_cast<uint64_t>(cols), static_cast<uint64_t>(sequences), static_cast<uint64_t>(positions)};
  const uint64_t strides[2] = {static_cast<uint64_t>(cols) * 2, static_cast<uint64_t>(sequences * cols) * 2};
  const uint32_t box[3] = {64, 1, box_positions};
  return make_tensor_map(map, base, 3, dims, strides, box);
}

}  // namespace megasparse::hopper
