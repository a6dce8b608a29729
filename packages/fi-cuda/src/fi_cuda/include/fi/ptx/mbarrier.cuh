// Barriers in shared memory that count arrivals of threads and bytes of asynchronous copies. Phases alternate: a wait names
// the parity of the phase it waits for, which is 0 for the first. PTX ISA, section "Parallel Synchronization and
// Communication Instructions: mbarrier".
#pragma once

#include "fi/ptx/shared_address.cuh"

namespace fi::ptx {

// A phase completes with `count` arrivals and all expected bytes. One thread calls it before any other use.
__device__ __forceinline__ void init_barrier(unsigned long long* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// Ends the barrier's life, so that its memory may be used for something else.
__device__ __forceinline__ void invalidate_barrier(unsigned long long* barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Makes the initialised barriers visible to the copy engine and to other blocks of the cluster; the thread that called
// init_barrier calls it before the block's (the cluster's) next barrier.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival; releases what this thread wrote before to those who wait.
__device__ __forceinline__ void arrive(unsigned long long* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// One arrival on the barrier at the same place in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ void arrive_in_cluster(unsigned long long* barrier, unsigned rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// One arrival, after the phase's expectation grew by `num_bytes` of copies that will complete on the barrier.
__device__ __forceinline__ void arrive_and_expect_bytes(unsigned long long* barrier, unsigned num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(num_bytes)
               : "memory");
}

// Whether the phase of this parity is complete, at once.
__device__ __forceinline__ bool test_barrier(unsigned long long* barrier, unsigned parity) {
  unsigned complete;
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
      "selp.u32 %0, 1, 0, complete;\n"
      "}"
      : "=r"(complete)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return complete != 0;
}

// The same, suspended for a while that the hardware chooses before it answers no.
__device__ __forceinline__ bool try_wait_barrier(unsigned long long* barrier, unsigned parity) {
  unsigned complete;
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
      "selp.u32 %0, 1, 0, complete;\n"
      "}"
      : "=r"(complete)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return complete != 0;
}

// Returns once the phase of this parity is complete; acquires what the arrivals released.
__device__ __forceinline__ void wait_barrier(unsigned long long* barrier, unsigned parity) {
  while (!try_wait_barrier(barrier, parity)) {
  }
}

}  // namespace fi::ptx
