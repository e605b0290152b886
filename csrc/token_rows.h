// Where a token lies in x, y and their gradients.
#pragma once

#include <cstdint>
#include <cuda_runtime_api.h>

namespace megasparse {

// Kernels number the M tokens sequence after sequence: tokens of a tile are neighbours in their sequence, which share more
// neurons. Rows of x, dy, y and dx come position after position, [length, sequences, D], as Megatron has them. With one
// sequence, token = row.
struct TokenRows {
  int32_t sequences;
  int32_t length;  // tokens of a sequence: a multiple of 128 where there are several, so that no tile spans two

  struct Place {
    int32_t sequence;
    int32_t position;
  };
  // Of any token, also one past the last: then `sequence` does not exist. Divides: once a tile, not in a loop over tokens.
  __host__ __device__ Place place(int32_t token) const {
    const int32_t sequence = static_cast<int32_t>(static_cast<uint32_t>(token) / static_cast<uint32_t>(length));
    return {sequence, token - sequence * length};
  }
  // Row of a token. The next tokens of its tile lie `sequences` rows on each.
  __host__ __device__ int64_t row(int32_t token) const {
    const Place at = place(token);
    return static_cast<int64_t>(at.position) * sequences + at.sequence;
  }
};

// Whether m tokens can be taken as that many sequences.
inline bool valid_sequences(int64_t m, int64_t sequences) {
  return m >= 0 && m <= INT32_MAX - 1024 && sequences > 0 && m % sequences == 0 &&
         (sequences == 1 || m / sequences % 128 == 0);
}
// Of valid sequences.
inline TokenRows make_token_rows(int64_t m, int64_t sequences) {
  return {static_cast<int32_t>(sequences), static_cast<int32_t>(m / sequences)};
}

}  // namespace megasparse
