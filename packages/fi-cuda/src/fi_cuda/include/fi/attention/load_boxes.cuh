// Copies of a chunk as boxes of a tensor map, issued by one lane: pages of 8 tokens and more, and ragged K and V.
#pragma once

#include "fi/attention/stage.cuh"
#include "fi/attention/walk.cuh"
#include "fi/ptx/mbarrier.cuh"
#include "fi/ptx/tma.cuh"

namespace fi {

// The maps' dims: page (ragged: one), KV head, column of the swizzle's width, token, element. A box has a head's tokens of one
// page, all columns.
template <class Config, class Params>
class BoxLoader {
  using Stage = ChunkStage<Config>;
  using Lookup = PageLookup<Config>;
  using Walk = ChunkWalk<Config, Params>;
  static constexpr bool kPaged = Config::kTable != kRagged;
  static constexpr int kBoxTokens = Stage::kBoxTokens;
  static_assert(Lookup::kWholePages && kBoxTokens == Lookup::kEntryTokens && kBoxTokens % 8 == 0, "a box begins where the swizzle's pattern does");

 public:
  static constexpr int kArrivals = 1;
  static constexpr bool kZeroesUnread = false;

  __device__ __forceinline__ BoxLoader(const Params&, const ptx::TensorMap& keys, const ptx::TensorMap& values)
      : keys_(keys), values_(values) {}

  // Starts the copies of the walk's chunk; `barrier` completes a phase when they have landed. Boxes without a readable token
  // are left out, others are copied whole.
  __device__ __forceinline__ void load(const Walk& walk, unsigned char* stage, unsigned long long* barrier) const {
    constexpr int kBoxBytes = Stage::Keys::kBoxBytes + Stage::Values::kBoxBytes;
    int num_boxes = 0;
#pragma unroll
    for (int box = 0; box < Lookup::kEntries; ++box) {
      num_boxes += walk.some_readable(walk.begin() + box * kBoxTokens, kBoxTokens);
    }
    if (walk.lane() == 0) ptx::arrive_and_expect_bytes(barrier, num_boxes * kBoxBytes);
#pragma unroll
    for (int box = 0; box < Lookup::kEntries; ++box) {
      const int position = walk.begin() + box * kBoxTokens;
      int page = 0, token;
      if constexpr (kPaged) {
        page = walk.page_of(box * kBoxTokens);
        token = static_cast<int>(static_cast<unsigned>(position) % Config::kPageSize);
      } else {
        token = static_cast<int>(walk.first_row()) + position;
      }
      if (walk.lane() == 0 && walk.some_readable(position, kBoxTokens)) {
        ptx::tma_load_5d(stage + box * Stage::Keys::kBoxBytes, &keys_, barrier, 0, token, 0, walk.kv_head(), page);
        ptx::tma_load_5d(stage + Stage::kValueBegin + box * Stage::Values::kBoxBytes, &values_, barrier, 0, token, 0,
                         walk.kv_head(), page);
      }
    }
  }

 private:
  const ptx::TensorMap& keys_;
  const ptx::TensorMap& values_;
};

}  // namespace fi
