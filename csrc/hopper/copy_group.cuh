// Completion of a thread's cp.async by groups. sm_90a only.
#pragma once

namespace megasparse::hopper {

// Groups of a thread's cp.async: commit closes one, wait returns when at most kPending of the newest are under way.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace megasparse::hopper
