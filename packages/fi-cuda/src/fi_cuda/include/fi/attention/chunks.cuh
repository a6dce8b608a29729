// How the warps of a block share an item's KV tokens: in chunks, one warp after the other, going on with the next warp
// where the previous item stopped, so that short items keep all warps busy too.
#pragma once

#include "fi/attention/item.cuh"
#include "fi/ptx/mbarrier.cuh"

namespace fi {

// Divisions here are of unsigned numbers, which take a shift.
template <int kChunkTokens>
__device__ __forceinline__ int num_chunks_of(const AttentionItem& item) {
  return static_cast<int>(static_cast<unsigned>(item.kv_end - item.kv_begin + kChunkTokens - 1) / kChunkTokens);
}

// Warps by what they share: `kRowWarps` neighbours take a tile's rows in parts and the same chunks, the others other chunks.
template <class Config>
struct WarpPlace {
  static constexpr int kRowWarps = Config::kRowWarps;
  static constexpr int kTokenWarps = Config::kNumWarps / kRowWarps;
  static constexpr int kWarpRows = Config::kRows / kRowWarps;
  static_assert(Config::kNumWarps % kRowWarps == 0 && Config::kRows % (8 * kRowWarps) == 0, "equal parts");
  int token_warp, row_warp;

  __device__ __forceinline__ WarpPlace()
      : token_warp(static_cast<int>(threadIdx.x / 32 / kRowWarps)), row_warp(static_cast<int>(threadIdx.x / 32 % kRowWarps)) {}

  // First row of this warp in the tile.
  __device__ __forceinline__ int first_row() const { return kRowWarps == 1 ? 0 : row_warp * kWarpRows; }
};

// Where the warps that share chunks meet. By an mbarrier on which every lane arrives: racecheck follows that order, while it
// reports what barriers of parts of a block have ordered.
template <class Config>
class ChunkMeeting {
  static constexpr int kRowWarps = WarpPlace<Config>::kRowWarps;

 public:
  static constexpr int kBarriers = kRowWarps > 1 ? 1 : 0;  // for each of the token warps

  __device__ __forceinline__ explicit ChunkMeeting(unsigned long long* barrier) : barrier_(barrier), parity_(0) {}

  // By one thread.
  __device__ __forceinline__ void init() const {
    if constexpr (kRowWarps > 1) ptx::init_barrier(barrier_, 32 * kRowWarps);
  }

  __device__ __forceinline__ void invalidate() const {
    if constexpr (kRowWarps > 1) ptx::invalidate_barrier(barrier_);
  }

  // All who share chunks are here.
  __device__ __forceinline__ void sync() {
    if constexpr (kRowWarps == 1) {
      __syncwarp();
    } else {
      ptx::arrive(barrier_);
      ptx::wait_barrier(barrier_, parity_);
      parity_ ^= 1;
    }
  }

 private:
  unsigned long long* barrier_;
  unsigned parity_;
};

// A warp's place in its share of a list of items.
template <int kNumWarps>
struct ChunkTurn {
  int turn;  // the warp that takes the item's first chunk

  __device__ __forceinline__ int first_chunk(int warp) const {
    return static_cast<int>(static_cast<unsigned>(warp - turn + kNumWarps) % kNumWarps);
  }
  __device__ __forceinline__ void pass(int num_chunks) {
    turn = static_cast<int>(static_cast<unsigned>(turn + num_chunks) % kNumWarps);
  }
};

}  // namespace fi
