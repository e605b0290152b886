// Work units handed from the thread that claims them to every warp of the block.
#pragma once

#include <cstdint>

#include "gather_gemm.cuh"

namespace megasparse {

constexpr int kWorkSlots = 4;

template <class Work>
struct WorkSlots {
  uint64_t full[kWorkSlots];
  uint64_t empty[kWorkSlots];
  Work slot[kWorkSlots];
};

template <class Work>
__device__ __forceinline__ void init_work(WorkSlots<Work>& slots, int reader_warps) {
  for (int i = 0; i < kWorkSlots; ++i) {
    hopper::mbarrier_init(&slots.full[i], 1);
    hopper::mbarrier_init(&slots.empty[i], reader_warps);
  }
}

// One thread of the block.
template <class Work>
__device__ __forceinline__ void post_work(WorkSlots<Work>& slots, hopper::RingState<kWorkSlots>& ring,
                                          const Work& work) {
  hopper::mbarrier_wait(&slots.empty[ring.stage], ring.parity ^ 1);
  slots.slot[ring.stage] = work;
  hopper::mbarrier_arrive(&slots.full[ring.stage]);
  ring.advance();
}

// Every reader warp, all lanes.
template <class Work>
__device__ __forceinline__ Work take_work(WorkSlots<Work>& slots, hopper::RingState<kWorkSlots>& ring, int lane) {
  hopper::mbarrier_wait(&slots.full[ring.stage], ring.parity);
  const Work work = slots.slot[ring.stage];
  __syncwarp();
  if (lane == 0) hopper::mbarrier_arrive(&slots.empty[ring.stage]);
  ring.advance();
  return work;
}

}  // namespace megasparse
