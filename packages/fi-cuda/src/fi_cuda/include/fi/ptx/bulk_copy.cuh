// Copies of contiguous bytes by the copy engine, issued by one thread. Addresses and sizes are multiples of 16 bytes.
// PTX ISA, section "Data Movement and Conversion Instructions: cp.async.bulk".
#pragma once

#include "fi/ptx/shared_address.cuh"

namespace fi::ptx {

__device__ __forceinline__ unsigned long long global_address(const void* pointer) {
  return static_cast<unsigned long long>(__cvta_generic_to_global(pointer));
}

// Completes `num_bytes` on `barrier`, which must expect them.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, unsigned num_bytes, unsigned long long* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global_address(global)), "r"(num_bytes), "r"(shared_address(barrier))
               : "memory");
}

// The same with a policy of l2_policy.cuh.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, unsigned num_bytes, unsigned long long* barrier,
                                          unsigned long long policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(shared)),
      "l"(global_address(global)), "r"(num_bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// From this block's shared memory to a neighbour's, where they complete on a barrier beside the place. What other threads or
// ordinary stores wrote to `shared` needs fence_proxy_async by its writers and a barrier first. Addresses: cluster.cuh.
__device__ __forceinline__ void bulk_copy_to_neighbour(unsigned address, const void* shared, unsigned num_bytes, unsigned barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address),
               "r"(shared_address(shared)), "r"(num_bytes), "r"(barrier)
               : "memory");
}

// Part of the thread's current group of stores. What other threads or ordinary stores wrote to `shared` needs
// fence_proxy_async by its writers and a barrier first.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, unsigned num_bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global_address(global)),
               "r"(shared_address(shared)), "r"(num_bytes)
               : "memory");
}

// Closes the thread's group of stores (also those of tma.cuh).
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Returns once at most kGroups of the thread's latest groups are not yet written.
template <int kGroups>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Returns once at most kGroups have not yet read their shared memory, which may then be overwritten.
template <int kGroups>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}

}  // namespace fi::ptx
