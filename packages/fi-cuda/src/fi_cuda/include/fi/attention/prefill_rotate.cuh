// RoPE of the queries of prefill (RoFormer, Su et al., 2021, section 3.4): a warpgroup rotates its rows where they were copied to,
// once for all the keys of an item. The query heads of a token share its angles.
#pragma once

#include "fi/attention/prefill_tiles.cuh"
#include "fi/attention/prefix_list.cuh"
#include "fi/ptx/fence.cuh"
#include "fi/ptx/named_barrier.cuh"
#include "fi/rope/rotate.cuh"
#include "fi/tile/swizzle.cuh"

namespace fi {

// Called by all threads of the warpgroup; afterwards products may read the rows. Those of tokens from rows.end on stay as they are.
template <class Config, class Params>
__device__ __forceinline__ void rotate_queries(const Params& params, const AttentionItem& item,
                                               const GroupRows<Config, Params>& rows, unsigned char* queries, int barrier) {
  using Tile = PrefillTile<Config>;
  using Words = Pack<typename Tile::Factor, 4>;
  constexpr bool kInHalves = Config::kRopePairs == kHalf;
  constexpr int kPairs = Words::kCount;
  constexpr int kUnits = Config::kRotaryDim / (2 * kPairs);  // of a row: two words
  static_assert(Config::kRotaryDim % (2 * kPairs) == 0 && sizeof(typename Tile::Factor) == 2);
  const auto word = [&](int row, int dim) {
    return reinterpret_cast<Words*>(queries + swizzled_place<kBoxRowBytes, 64>(row, dim * static_cast<int>(sizeof(typename Tile::Factor))));
  };
  const int num_units = (rows.end - rows.first) * kUnits;
  // What depends on the thread is computed here: kept from item to item it would take registers from the scores.
  int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  asm volatile("" : "+r"(thread));
#pragma unroll 1
  for (int unit = thread; unit < num_units; unit += kWarpgroupThreads) {
    const int token = unit / kUnits, pair = unit % kUnits * kPairs;
    int position = query_position(rows.first + token, item.q_len, item.kv_len);
    if constexpr (Config::kLevels) {  // a node's tokens are those of many requests
      if (item.kind == kNodeItem) position = static_cast<const int*>(params.positions)[item.q_begin + rows.first + token];
    }
    const Rotation<kPairs> rotation =
        rotation_at<kPairs>(position, static_cast<const float*>(params.inv_freq), pair, params.rope_factor);
    const int first = kInHalves ? pair : 2 * pair, second = kInHalves ? pair + Config::kRotaryDim / 2 : first + kPairs;
#pragma unroll 4
    for (int head = 0; head < Tile::kGroup; ++head) {
      const int row = token * Tile::kGroup + head;
      Words a = *word(row, first), b = *word(row, second);
      rotate<Config::kRopePairs>(a, b, rotation);
      *word(row, first) = a;
      *word(row, second) = b;
    }
  }
  ptx::fence_proxy_async_shared();
  ptx::named_barrier_sync(barrier, kWarpgroupThreads);
}

}  // namespace fi
