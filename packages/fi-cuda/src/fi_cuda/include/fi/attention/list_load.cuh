// What producers of tiles from a list have in common: the next one's number, and where consumers read what an item is.
#pragma once

#include "fi/attention/prefill_tiles.cuh"
#include "fi/ptx/named_barrier.cuh"
#include "fi/ptx/tma.cuh"

namespace fi {

// Copies: what copies_of gives. Its warps, which alone call this, walk the list side by side; the first one brings the queries
// (map: token, head, element).
template <class Config, class Params, class Copies>
class ListLoader {
 protected:
  using Tile = PrefillTile<Config>;
  using Shared = PrefillShared<Config>;
  static constexpr int kColumns = Shared::kRecordLanes;  // of an item's row

  __device__ __forceinline__ ListLoader(const Params& params, const ptx::TensorMap& queries, const Copies& copies, Shared& shared)
      : params_(params), queries_(queries), copies_(copies), shared_(shared),
        lane_(static_cast<int>(threadIdx.x) % kWarpThreads), is_first_(warp_idx() == 0) {}

  // A cluster's blocks are one worker.
  static __device__ __forceinline__ int worker() { return static_cast<int>(blockIdx.x) / Tile::kCluster; }

  // Asks for a further tile; the first lane of the worker's first warp knows the answer.
  __device__ __forceinline__ int asked(int& counter) const { return is_asking() ? atomicAdd(&counter, 1) : 0; }

  // What was asked for, to all. Every worker that took a tile is told once that there is none, so `total` are taken in all, and the
  // last one resets.
  __device__ __forceinline__ int told(int taken, int& counter, int total) {
    if (is_asking() && taken == total - 1) counter = 0;
    if constexpr (Tile::kCluster > 1) {
      taken = told_by_first_block(taken);
    } else if constexpr (Copies::kWarps > 1) {
      turn_ ^= 1;  // the place before is still read
      if (is_first_ && lane_ == 0) shared_.taken[turn_] = taken;
      ptx::named_barrier_sync(kProducerBarrier, Copies::kWarps * kWarpThreads);
      taken = shared_.taken[turn_];
    } else {
      taken = __shfl_sync(0xffffffffu, taken, 0);
    }
    return static_cast<int>(gridDim.x) / Tile::kCluster + taken;
  }

  // By the first warp: a lane's column of an item's row to where consumers read it. The first lane's arrival is the queries'.
  __device__ __forceinline__ void put_item(int value) {
    shared_.query_ring.acquire(query_);
    if (lane_ < kColumns) reinterpret_cast<int*>(&shared_.items[item_.stage])[lane_] = value;
    if (0 < lane_ && lane_ < kColumns) ptx::arrive(&shared_.query_ring.full[query_.stage]);
  }

  __device__ __forceinline__ void end_list() {
    shared_.query_ring.acquire(query_);
    if (lane_ == 0) shared_.items[item_.stage].request = kNoRequest;
    if (lane_ < kColumns) ptx::arrive(&shared_.query_ring.full[query_.stage]);
  }

  __device__ __forceinline__ bool is_asking() const {
    if constexpr (Tile::kCluster > 1) {
      if (ptx::rank_in_cluster_again() != 0) return false;
    }
    return is_first_ && lane_ == 0;
  }

  // The cluster's first block stores it to all; a place is free once every warp of them has read it.
  __device__ __forceinline__ int told_by_first_block(int taken) {
    const int stage = turn_ % 2;
    if (is_asking()) {
      ptx::wait_barrier(&shared_.told_ring.empty[stage], (turn_ / 2 + 1) % 2);
#pragma unroll
      for (unsigned rank = 0; rank < Tile::kCluster; ++rank) {
        ptx::store_async(ptx::address_in_cluster(&shared_.told[stage], rank), uint2{static_cast<unsigned>(taken), 0u},
                         ptx::address_in_cluster(&shared_.told_ring.full[stage], rank));
      }
    }
    if (is_first_ && lane_ == 0) ptx::arrive_and_expect_bytes(&shared_.told_ring.full[stage], sizeof(uint2));
    ptx::wait_barrier(&shared_.told_ring.full[stage], turn_ / 2 % 2);
    taken = static_cast<int>(shared_.told[stage].x);
    __syncwarp();
    if (lane_ == 0) ptx::arrive_in_cluster(&shared_.told_ring.empty[stage], 0);
    turn_ = (turn_ + 1) % 4;
    return taken;
  }

  const Params& params_;
  const ptx::TensorMap& queries_;
  Copies copies_;
  Shared& shared_;
  const int lane_;
  const bool is_first_;
  int turn_ = 0;
  RingCursor<Config::kQueryStages> query_ = RingCursor<Config::kQueryStages>::producer();
  RingCursor<Shared::kItems> item_ = RingCursor<Shared::kItems>::producer();
};

}  // namespace fi
