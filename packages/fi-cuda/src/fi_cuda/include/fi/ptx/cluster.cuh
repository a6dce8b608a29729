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

// The same, read where it stands: for a value that would occupy a register for long.
__device__ __forceinline__ unsigned rank_in_cluster_again() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
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

// Stores into a neighbour's shared memory that complete their bytes on a barrier (mbarrier.cuh) beside the place: whoever waits
// for that sees them. Both addresses are of the same block, which has started and made its barrier. PTX ISA, section "Data
// Movement and Conversion Instructions: st.async".
__device__ __forceinline__ void store_async(unsigned address, unsigned value, unsigned barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address), "r"(value),
               "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void store_async(unsigned address, uint2 value, unsigned barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(address),
               "r"(value.x), "r"(value.y), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void store_async(unsigned address, uint4 value, unsigned barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void store_async(unsigned address, unsigned long long value, unsigned barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(address), "l"(value),
               "r"(barrier)
               : "memory");
}

}  // namespace fi::ptx
