// Copies of a chunk as boxes of a tensor map, a lane a box: pages of 8 tokens and more, and ragged K and V.
#pragma once

#include "fi/attention/stage.cuh"
#include "fi/attention/walk.cuh"
#include "fi/ptx/l2_policy.cuh"
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
  static_assert(Lookup::kWholePages && kBoxTokens == Lookup::kEntryTokens && kBoxTokens % 8 == 0,
                "a box begins where the swizzle's pattern does");

 public:
  static constexpr int kArrivals = 1;
  static constexpr bool kZeroesUnread = false;

  __device__ __forceinline__ BoxLoader(const Params&, const ptx::TensorMap& keys, const ptx::TensorMap& values)
      : keys_(keys), values_(values) {}

  // Starts the copies of the walk's chunk; `barrier` completes a phase when they have landed. Boxes without a readable token
  // are left out, others are copied whole. A lane a box: what they copy is then found at once.
  __device__ __forceinline__ void load(const Walk& walk, unsigned char* stage, unsigned long long* barrier) const {
    constexpr int kEntries = Lookup::kEntries;
    const int box = walk.lane() % kEntries, position = walk.begin() + box * kBoxTokens;
    const bool of_keys = walk.lane() < kEntries, readable = walk.some_readable(position, kBoxTokens);
    int page = 0, token;
    if constexpr (kPaged) {
      page = walk.page_of(box * kBoxTokens);
      token = static_cast<int>(static_cast<unsigned>(position) % Config::kPageSize);
    } else {
      token = static_cast<int>(walk.first_row()) + position;
    }
    const int num_boxes = kEntries == 1 ? readable : __popc(__ballot_sync(0xffffffffu, of_keys && readable));
    if (walk.lane() == 0) {
      ptx::arrive_and_expect_bytes(barrier, num_boxes * (Stage::Keys::kBoxBytes + Stage::Values::kBoxBytes));
    }
    __syncwarp();  // the expectation comes first
    if (walk.lane() < 2 * kEntries && readable) {
      unsigned char* to = stage + (of_keys ? box * Stage::Keys::kBoxBytes : Stage::kValueBegin + box * Stage::Values::kBoxBytes);
      const ptx::TensorMap* map = of_keys ? &keys_ : &values_;
      if constexpr (Config::kReadOnce) {
        ptx::tma_load_5d(to, map, barrier, 0, token, 0, walk.kv_head(), page, ptx::evict_first_policy());
      } else {
        ptx::tma_load_5d(to, map, barrier, 0, token, 0, walk.kv_head(), page);
      }
    }
  }

 private:
  const ptx::TensorMap& keys_;
  const ptx::TensorMap& values_;
};

}  // namespace fi
