// Each thread's own asynchronous copies from global to shared memory, up to 16 bytes a copy. sm_80.
// PTX ISA, section "Data Movement and Conversion Instructions: cp.async".
#pragma once

#include "fi/ptx/shared_address.cuh"

namespace fi::ptx {

// Copies 16 bytes past L1, or writes zeros and reads nothing if not `valid`; both addresses are multiples of 16 (an invalid
// copy's global address too).
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

// Copies the first `num_bytes` of kBytes (4, 8 or 16, of which both addresses are multiples) and writes zeros behind them; 16 past L1.
template <int kBytes>
__device__ __forceinline__ void cp_async_part(void* shared, const void* global, int num_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(num_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "n"(kBytes), "r"(num_bytes)
                 : "memory");
  }
}

// Closes the thread's group of copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns once at most kGroups of the thread's latest groups are not yet complete. Other threads see the bytes after a
// barrier.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Arrives on the barrier once the thread's copies so far are complete; this arrival is one of the barrier's count.
__device__ __forceinline__ void cp_async_arrive_noinc(unsigned long long* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

}  // namespace fi::ptx
