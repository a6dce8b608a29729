// Barriers of some of a block's warps. Ids 1 to 15; 0 is __syncthreads. `num_threads`, a multiple of 32, counts all who
// sync or arrive. PTX ISA, section "Parallel Synchronization and Communication Instructions: bar/barrier".
#pragma once

namespace fi::ptx {

// Waits until num_threads threads have called either function; memory accesses before are visible after.
__device__ __forceinline__ void named_barrier_sync(int id, int num_threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// Counts without waiting.
__device__ __forceinline__ void named_barrier_arrive(int id, int num_threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

}  // namespace fi::ptx
