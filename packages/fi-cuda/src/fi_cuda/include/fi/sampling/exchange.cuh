// Small values from every block of a cluster to every other: pushed into the same place of each block's shared memory, and
// visible after the cluster's next barrier. A place is written again only after a barrier that all readers have passed.
#pragma once

#include "fi/ptx/cluster.cuh"
#include "fi/ptx/fence.cuh"

namespace fi {

template <int kBlocks>
__device__ __forceinline__ void cluster_sync() {
  if constexpr (kBlocks > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
}

template <int kBlocks>
__device__ __forceinline__ int cluster_rank() {
  return kBlocks > 1 ? static_cast<int>(ptx::rank_in_cluster()) : 0;
}

// Each of the first kBlocks lanes of one warp stores `value` at `place` of one block.
template <int kBlocks, class T>
__device__ __forceinline__ void push_to_all(T* place, T value) {
  const unsigned lane = threadIdx.x % 32;
  if (lane < kBlocks) ptx::store_to_cluster(ptx::address_in_cluster(place, lane), value);
}

}  // namespace fi
