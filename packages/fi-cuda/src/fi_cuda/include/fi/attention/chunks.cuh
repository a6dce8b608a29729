// How the warps of a block share an item's KV tokens: in chunks, one warp after the other, going on with the next warp
// where the previous item stopped, so that short items keep all warps busy too. Or each warp has a KV head of its own and all its chunks.
#pragma once

#include "fi/attention/item.cuh"
#include "fi/ptx/mbarrier.cuh"

namespace fi {

// Divisions here are of unsigned numbers, which take a shift.
template <int kChunkTokens>
__device__ __forceinline__ int num_chunks_of(const AttentionItem& item) {
  return static_cast<int>(static_cast<unsigned>(item.kv_end - item.kv_begin + kChunkTokens - 1) / kChunkTokens);
}

// Warps by what they share: `kRowWarps` neighbours take a tile's rows in parts and the same chunks, the others other chunks. A tile
// may have `kHeadWarps` neighbouring KV heads, one for each warp: the item of a warp is the same tokens of its head.
template <class Config>
struct WarpPlace {
  static constexpr int kRowWarps = Config::kRowWarps, kHeadWarps = Config::kHeadWarps;
  static constexpr int kRings = Config::kNumWarps / kRowWarps;
  static constexpr int kTokenWarps = kRings / kHeadWarps;
  static constexpr int kWarpRows = Config::kRows / kRowWarps;
  static constexpr int kHeadThreads = Config::kNumWarps / kHeadWarps * 32;  // that a KV head has
  static_assert(Config::kNumWarps % kRowWarps == 0 && Config::kRows % (8 * kRowWarps) == 0, "equal parts");
  static_assert(kHeadWarps == 1 || kHeadWarps == Config::kNumWarps, "the heads of a tile meet nowhere");
  int ring, token_warp, row_warp, head_warp;

  __device__ __forceinline__ WarpPlace()
      : ring(static_cast<int>(threadIdx.x / 32 / kRowWarps)), token_warp(kHeadWarps == 1 ? ring : 0),
        row_warp(static_cast<int>(threadIdx.x / 32 % kRowWarps)), head_warp(kHeadWarps == 1 ? 0 : ring) {}

  // The item, or the part of it, that is this warp's.
  __device__ __forceinline__ AttentionItem own(const AttentionItem& item) const {
    AttentionItem own = item;
    own.kv_head = item.kv_head * kHeadWarps + head_warp;
    return own;
  }

  // All who have this KV head are here.
  static __device__ __forceinline__ void sync_head() {
    if constexpr (kHeadWarps == 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

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
