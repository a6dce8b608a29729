// Values from every block of a cluster to its neighbours: stored straight into the receiver's shared memory, where they complete
// their bytes on a barrier that the receiver waits for. No barrier of the whole cluster, and no fence, is needed.
#pragma once

#include "fi/ptx/cluster.cuh"
#include "fi/ptx/fence.cuh"
#include "fi/ptx/mbarrier.cuh"

namespace fi {

// What is sent, each kind on a barrier of its own. A kind is sent again only after every block has received it, because what
// its senders did in between needed something of every receiver.
enum Message : int { kExtremes, kExtremesAgain, kParts, kPartsAgain, kShares, kList, kFound, kAmounts, kSums, kNumMessages };

template <int kBlocks>
struct Mailbox {
  unsigned long long* barriers;  // [kNumMessages], shared memory
  unsigned phases = 0;           // a bit a kind: parity of the next to receive

  // All threads, before anything else; then `ready`.
  __device__ __forceinline__ void open() {
    if (kBlocks > 1 && threadIdx.x == 0) {
#pragma unroll
      for (int kind = 0; kind < kNumMessages; ++kind) ptx::init_barrier(&barriers[kind], 1);
      ptx::fence_barrier_init();
    }
    __syncthreads();
  }

  // All threads, when what is sent to this block may overwrite its memory; nothing is sent before `opened`.
  __device__ __forceinline__ void ready() const {
    if constexpr (kBlocks > 1) ptx::cluster_arrive_relaxed();
  }

  // Waits until all blocks are ready.
  __device__ __forceinline__ void opened() const {
    if constexpr (kBlocks > 1) ptx::cluster_wait();
  }

  // Stores `value` at `place` of block `block`.
  template <class T>
  __device__ __forceinline__ void send(Message kind, unsigned block, T* place, T value) const {
    if constexpr (kBlocks > 1) {
      ptx::store_async(ptx::address_in_cluster(place, block), value, ptx::address_in_cluster(&barriers[kind], block));
    } else {
      *place = value;  // such stores need a cluster
    }
  }

  // The same to all blocks, by the first kBlocks lanes of a warp, which all call it with equal values.
  template <class T>
  __device__ __forceinline__ void send_to_all(Message kind, T* place, T value) const {
    const unsigned lane = threadIdx.x % 32;
    if (lane < kBlocks) send(kind, lane, place, value);
  }

  // Waits for `num_bytes` sent to this block. All threads, for which it is a barrier too: one warp asks the message's barrier, as
  // asking takes instructions, of which the other blocks on the multiprocessor could make use.
  __device__ __forceinline__ void receive(Message kind, unsigned num_bytes) {
    if constexpr (kBlocks > 1) receive_in_first_warp(kind, num_bytes);
    __syncthreads();
  }

  // The same without the barrier, up to which only the first warp may read.
  __device__ __forceinline__ void receive_in_first_warp(Message kind, unsigned num_bytes) {
    if constexpr (kBlocks > 1) {
      if (threadIdx.x < 32) {
        if (threadIdx.x == 0) ptx::arrive_and_expect_bytes(&barriers[kind], num_bytes);
        ptx::wait_barrier(&barriers[kind], phases >> kind & 1);
      }
      phases ^= 1u << kind;
    } else {
      __syncthreads();
    }
  }
};

template <int kBlocks>
__device__ __forceinline__ int cluster_rank() {
  return kBlocks > 1 ? static_cast<int>(ptx::rank_in_cluster()) : 0;
}

}  // namespace fi
