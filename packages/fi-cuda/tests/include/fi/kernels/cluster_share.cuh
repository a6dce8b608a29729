// Blocks of a cluster add up each other's numbers and get one box by one multicast load.
#pragma once

#include "fi/ptx/cluster.cuh"
#include "fi/ptx/fence.cuh"
#include "fi/ptx/mbarrier.cuh"
#include "fi/ptx/tma.cuh"

namespace fi {

template <class Config, class Params>
__device__ __forceinline__ void cluster_share(const Params& params, const ptx::TensorMap& box) {
  constexpr int kSize = 8 * 32;
  __shared__ alignas(1024) float tile[kSize];
  __shared__ unsigned long long loaded, arrived;
  __shared__ float mine;
  const unsigned rank = ptx::rank_in_cluster();
  if (threadIdx.x == 0) {
    ptx::init_barrier(&loaded, 1);
    ptx::init_barrier(&arrived, Config::kBlocks);
    ptx::fence_barrier_init();
    ptx::arrive_and_expect_bytes(&loaded, sizeof(tile));
    mine = static_cast<float>(blockIdx.x + 1);
  }
  __syncthreads();
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (threadIdx.x == 0) {
    constexpr unsigned short kAll = (1 << Config::kBlocks) - 1;
    if (rank == 0) ptx::tma_load_multicast_2d(tile, &box, &loaded, 0, blockIdx.x / Config::kBlocks * 8, kAll);
    float total = 0.0f;
    for (int other = 0; other < Config::kBlocks; ++other) {
      total += ptx::load_from_cluster(ptx::address_in_cluster(&mine, other));
    }
    static_cast<float*>(params.totals)[blockIdx.x] = total * static_cast<float>(ptx::num_blocks_in_cluster());
    // Every block arrives on the barrier of every block.
    for (int other = 0; other < Config::kBlocks; ++other) ptx::arrive_in_cluster(&arrived, other);
    ptx::wait_barrier(&arrived, 0);
  }
  ptx::wait_barrier(&loaded, 0);
  for (int idx = threadIdx.x; idx < kSize; idx += Config::kNumThreads) {
    static_cast<float*>(params.boxes)[blockIdx.x * kSize + idx] = tile[idx];
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

}  // namespace fi
