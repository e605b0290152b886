// Work units handed from the thread that claims them to every warp of the block, and row lists that run ahead of them.
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
__device__ __forceinline__ void post_work(WorkSlots<Work>& slots, hopper::RingState<kWorkSlots>& ring, const Work& work) {
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

// A ring of small list entries (one a k-step) that bulk copies fill ahead of the gather, across work units. Loads through
// the LSU would wait behind the cp.async of several stages; bulk copies do not.
template <int kSlots>
struct ListSlots {
  uint64_t full[kSlots];
  uint64_t empty[kSlots];
};

template <int kSlots>
__device__ __forceinline__ void init_lists(ListSlots<kSlots>& slots, int reader_warps) {
  for (int i = 0; i < kSlots; ++i) {
    hopper::mbarrier_init(&slots.full[i], 1);
    hopper::mbarrier_init(&slots.empty[i], reader_warps);
  }
}

// The filling side, one thread. It knows the unit it is copying the lists of, and the one after that once claimed.
// Fetch: void operator()(const Work&, int step, int slot, uint64_t* full) copies the entry of one k-step.
template <class Work, int kSlots, int kAhead>
struct ListFeeder {
  static_assert(kAhead < kSlots);
  Work work;
  int step = 0, steps = 0;
  Work next;
  int next_steps = -1;  // -1: not claimed yet
  int lead = 0;         // entries issued and not yet gathered
  hopper::RingState<kSlots> ring;

  __device__ __forceinline__ void announce(const Work& unit, int unit_steps) {
    next = unit;
    next_steps = unit_steps;
  }
  template <class Fetch>
  __device__ __forceinline__ void feed(ListSlots<kSlots>& slots, Fetch fetch) {
    while (lead < kAhead) {
      if (step == steps) {
        if (next_steps < 0) return;
        work = next;
        steps = next_steps;
        step = 0;
        next_steps = -1;
        continue;
      }
      hopper::mbarrier_wait(&slots.empty[ring.stage], ring.parity ^ 1);
      fetch(work, step, ring.stage, &slots.full[ring.stage]);
      ring.advance();
      ++step;
      ++lead;
    }
  }
};

}  // namespace megasparse
