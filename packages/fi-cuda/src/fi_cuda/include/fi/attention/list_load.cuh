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

  static __device__ __forceinline__ int lane() { return thread_anew() % kWarpThreads; }

  __device__ __forceinline__ ListLoader(const Params& params, const ptx::TensorMap& queries, const Copies& copies, Shared& shared)
      : params_(params), queries_(queries), copies_(copies), shared_(shared), is_first_(warp_idx() == 0) {}

  // Asks for a further tile; the first lane of the first warp knows the answer.
  __device__ __forceinline__ int asked(int& counter) const { return is_first_ && lane() == 0 ? atomicAdd(&counter, 1) : 0; }

  // What was asked for, to all. Every block that took a tile is told once that there is none, so `total` are taken in all, and the
  // last one resets.
  __device__ __forceinline__ int told(int taken, int& counter, int total) {
    if (is_first_ && lane() == 0 && taken == total - 1) counter = 0;
    if constexpr (Copies::kWarps > 1) {
      int& place = shared_.taken[item_.stage % 2];  // the one before is still read
      if (is_first_ && lane() == 0) place = taken;
      ptx::named_barrier_sync(kProducerBarrier, Copies::kWarps * kWarpThreads);
      taken = place;
    } else {
      taken = __shfl_sync(0xffffffffu, taken, 0);
    }
    return static_cast<int>(gridDim.x) + taken;
  }

  // By the first warp: a lane's column of an item's row to where consumers read it. The first lane's arrival is the queries'.
  __device__ __forceinline__ void put_item(int value) {
    shared_.query_ring.acquire(query_);
    if (lane() < kColumns) reinterpret_cast<int*>(&shared_.items[item_.stage])[lane()] = value;
    if (0 < lane() && lane() < kColumns) ptx::arrive(&shared_.query_ring.full[query_.stage]);
  }

  __device__ __forceinline__ void end_list() {
    shared_.query_ring.acquire(query_);
    if (lane() == 0) shared_.items[item_.stage].request = kNoRequest;
    if (lane() < kColumns) ptx::arrive(&shared_.query_ring.full[query_.stage]);
  }

  const Params& params_;
  const ptx::TensorMap& queries_;
  Copies copies_;
  Shared& shared_;
  const bool is_first_;
  RingCursor<Config::kQueryStages> query_ = RingCursor<Config::kQueryStages>::producer();
  RingCursor<Shared::kItems> item_ = RingCursor<Shared::kItems>::producer();
};

}  // namespace fi
