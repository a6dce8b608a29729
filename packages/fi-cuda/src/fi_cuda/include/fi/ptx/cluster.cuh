// A block's place in its cluster, and the shared memory of its neighbours. PTX ISA, sections "Special Registers:
// %cluster_ctarank, %cluster_nctarank" and "Data Movement and Conversion Instructions: mapa, ld".
#pragma once

#include "fi/ptx/shared_address.cuh"

namespace fi::ptx {

__device__ __forceinline__ unsigned rank_in_cluster() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ unsigned num_blocks_in_cluster() {
  unsigned count;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return count;
}

// The address, in the cluster's shared memory, of what block `rank` has where this block has `pointer`.
__device__ __forceinline__ unsigned address_in_cluster(const void* pointer, unsigned rank) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
  return address;
}

// Between a cluster barrier after the owner's write and one before the owner overwrites it or ends.
__device__ __forceinline__ float load_from_cluster(unsigned address) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

// Reads and writes of neighbours' shared memory. A block must have started before another writes to it, and what is written
// before a cluster barrier is visible after it.
__device__ __forceinline__ uint2 load_two_from_cluster(unsigned address) {
  uint2 value;
  asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_to_cluster(unsigned address, unsigned value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_to_cluster(unsigned address, uint2 value) {
  asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(value.x), "r"(value.y) : "memory");
}

__device__ __forceinline__ void store_to_cluster(unsigned address, uint4 value) {
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

__device__ __forceinline__ void store_to_cluster(unsigned address, unsigned long long value) {
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(address), "l"(value) : "memory");
}

}  // namespace fi::ptx
