// Order of memory accesses between threads, blocks and the copy engine. PTX ISA, sections "Parallel Synchronization and
// Communication Instructions: membar/fence, barrier.cluster" and "Memory Consistency Model".
#pragma once

namespace fi::ptx {

// Orders this thread's ordinary accesses before later ones by wgmma and the copy engine: of all memory, and of the block's
// shared memory alone.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ __forceinline__ void fence_proxy_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
__device__ __forceinline__ void fence_acq_rel_cluster() { asm volatile("fence.acq_rel.cluster;" ::: "memory"); }

// The cluster's barrier in two halves, called by all threads of all its blocks: what was written before the arrival is
// visible after the wait.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// The arrival without the release, where nothing was written that others are to see.
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Flags in global memory between blocks of the GPU: what a thread wrote before store_release or red_release is visible to
// the thread that sees the value with load_acquire.
__device__ __forceinline__ int load_acquire(const int* flag) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(flag)) : "memory");
  return value;
}

__device__ __forceinline__ unsigned long long load_acquire(const unsigned long long* flag) {
  unsigned long long value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(__cvta_generic_to_global(flag)) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(unsigned long long* flag, unsigned long long value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(flag)), "l"(value) : "memory");
}

__device__ __forceinline__ void store_release(int* flag, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(flag)), "r"(value) : "memory");
}

// *flag += value
__device__ __forceinline__ void red_release(int* flag, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(flag)), "r"(value) : "memory");
}

// *flag += value; returns what it was. Acquires what earlier ones released.
__device__ __forceinline__ int add_acq_rel(int* flag, int value) {
  int previous;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(previous)
               : "l"(__cvta_generic_to_global(flag)), "r"(value)
               : "memory");
  return previous;
}

}  // namespace fi::ptx
