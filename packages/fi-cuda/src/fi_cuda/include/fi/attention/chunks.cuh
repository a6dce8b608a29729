// How the warps of a block share an item's KV tokens: in chunks, one warp after the other, going on with the next warp
// where the previous item stopped, so that short items keep all warps busy too.
#pragma once

#include "fi/attention/item.cuh"

namespace fi {

// Divisions here are of unsigned numbers, which take a shift.
template <int kChunkTokens>
__device__ __forceinline__ int num_chunks_of(const AttentionItem& item) {
  return static_cast<int>(static_cast<unsigned>(item.kv_end - item.kv_begin + kChunkTokens - 1) / kChunkTokens);
}

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
