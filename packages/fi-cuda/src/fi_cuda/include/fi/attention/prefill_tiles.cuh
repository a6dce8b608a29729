// Tiles of prefill: how packed query rows are shared by the warpgroups of a block, and what shared memory holds.
#pragma once

#include "fi/attention/item.cuh"
#include "fi/pipeline/ring.cuh"
#include "fi/pipeline/roles.cuh"
#include "fi/softmax/columns.cuh"
#include "fi/tile/fp8.cuh"

namespace fi {

// The thread's number within its warpgroup, computed where it is called: what the compiler keeps of it from step to step takes
// registers from scores, and producers have none to spare.
__device__ __forceinline__ int thread_anew() {
  unsigned thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return static_cast<int>(thread % kWarpgroupThreads);
}

// When a step's keys and values are copied, numbered as in fi_cuda.kernels.attention: values after the keys, after those of the next
// step, or as soon as a stage is free, by a warp of their own.
enum CopyOrder { kInOrder, kKeysAhead, kApart };

// K and V come row by row, as they are stored, from producers that show them to the products.
template <class Config>
constexpr bool kGathered = !Config::kBoxes && !Config::kOverlap && Config::kLandingStages == 0 &&
                           sizeof(typename Config::Stored) == sizeof(typename Config::Query);

// Rows in boxes of 128 bytes, as TMA's widest swizzle lays them out; the last box of a row may be partly empty.
constexpr int kBoxRowBytes = 128;

template <class Config>
struct PrefillTile {
  using Factor = typename Config::Query;  // what is multiplied
  static constexpr bool kFp8 = kIsFp8<Factor>;
  static constexpr int kBoxElements = kBoxRowBytes / static_cast<int>(sizeof(Factor));
  static constexpr int kStepElements = 32 / static_cast<int>(sizeof(Factor));  // of the inner dim of one product
  static constexpr int kGroup = Config::kGroupSize;
  // A warpgroup's 64 accumulator rows hold whole tokens, so that one copy brings their query heads.
  static constexpr int kGroupTokens = 64 / kGroup;
  static constexpr int kGroupRows = kGroupTokens * kGroup;
  static constexpr int kTileTokens = Config::kConsumers * kGroupTokens;
  static_assert(kGroup <= 64, "a token's query heads of a KV head lie in one warpgroup");

  static constexpr int kTokens = Config::kTokens;
  static constexpr int kKeyColumns = (Config::kHeadDim + kBoxElements - 1) / kBoxElements;
  static constexpr int kValueColumns = (Config::kHeadDimVo + kBoxElements - 1) / kBoxElements;
  static constexpr int kKeyColumnBytes = kTokens * kBoxRowBytes;
  static constexpr int kQueryColumnBytes = 64 * kBoxRowBytes;
  static constexpr int kQueryBytes = kKeyColumns * kQueryColumnBytes;  // of a warpgroup
  static_assert(kTokens % kStepElements == 0 && Config::kHeadDim % kStepElements == 0 && Config::kHeadDimVo % 16 == 0);

  // FP8 is multiplied with the inner dim contiguous, so values lie transposed, a row a dim: columns of 128 tokens.
  static constexpr int kTransposedColumns = (kTokens + kBoxRowBytes - 1) / kBoxRowBytes;
  static constexpr int kTransposedColumnBytes = Config::kHeadDimVo * kBoxRowBytes;
  static constexpr int kValueBytes =
      kFp8 ? kTransposedColumns * kTransposedColumnBytes : kValueColumns * kKeyColumnBytes;

  // What is not multiplied as it is stored may land in a ring of its own, from which the producers transpose it or make it wider.
  static constexpr bool kLanded = Config::kLandingStages > 0;
  static constexpr int kLandingStages = kLanded ? Config::kLandingStages : 1;
  static constexpr int kLandingColumns =
      ((Config::kHeadDim > Config::kHeadDimVo ? Config::kHeadDim : Config::kHeadDimVo) + kBoxRowBytes - 1) / kBoxRowBytes;
  static constexpr int kLandingBytes = kLandingColumns * kKeyColumnBytes;
  static_assert(kLanded || !kFp8);
};

// The stages of the ring where K and V land, if there is one.
template <class Config, bool kLanded = PrefillTile<Config>::kLanded>
struct PrefillLanding {};
template <class Config>
struct PrefillLanding<Config, true> {
  unsigned char landing[Config::kLandingStages][PrefillTile<Config>::kLandingBytes];
};

// The dense copy that a producing warp reads or makes: where it goes on, in columns of the warp's rows, and whose it is.
struct DenseCopy {
  unsigned column;
  int owner;        // a request and KV head
  int is_in_order;  // the item comes in runs
};
// What it found for the next item: the record of its owner's copy.
struct DenseAhead {
  unsigned long long record;
  int owner;
};

// What the lanes of the producing warps look up, of two steps, and each warp's dense copy.
template <bool kGathered>
struct PrefillPlaces {};
template <>
struct PrefillPlaces<true> {
  alignas(16) int places[2][kWarpgroupThreads];
  DenseCopy dense[kWarpgroupThreads / kWarpThreads];
  DenseAhead dense_ahead[kWarpgroupThreads / kWarpThreads];
};

// At a multiple of 1024, where the swizzle's patterns begin.
template <class Config>
struct PrefillShared : PrefillLanding<Config> {
  using Tile = PrefillTile<Config>;
  // More than queries, as an item is still read when its queries are released; twice as many, so that an item's place says in
  // which phase its queries' stage is.
  static constexpr int kItems = 2 * Config::kQueryStages;
  // A lane writes a column of an item; each arrives with the item's queries, so that every write is ordered before the reads.
  static constexpr int kRecordLanes = sizeof(AttentionItem) / sizeof(int);
  static constexpr int kReleases = Config::kConsumers * (kWarpgroupThreads / kWarpThreads);

  unsigned char queries[Config::kQueryStages][Config::kConsumers][Tile::kQueryBytes];
  unsigned char keys[Config::kKeyStages][Tile::kKeyColumns * Tile::kKeyColumnBytes];
  unsigned char values[Config::kValueStages][Tile::kValueBytes];
  AttentionItem items[kItems];
  Ring<Config::kQueryStages> query_ring;
  Ring<Config::kKeyStages> key_ring;
  Ring<Config::kValueStages> value_ring;
  PrefillPlaces<kGathered<Config>> looked_up;
  int flags[Config::kConsumers];
  int taken[2];  // what producers of several warps tell one another
  Ring<Tile::kLandingStages> landing_ring;

  // Copies says how many arrivals fill a stage of keys, of values, and of what lands; the caller, of queries.
  template <class Copies>
  __device__ __forceinline__ void init(int num_query_arrivals) {
    query_ring.init(num_query_arrivals, kReleases);
    key_ring.init(Copies::kKeyArrivals, kReleases);
    value_ring.init(Copies::kValueArrivals, kReleases);
    if constexpr (Tile::kLanded) landing_ring.init(Copies::kLandingArrivals, kWarpgroupThreads / kWarpThreads);
  }
};

// Named barriers: a warpgroup's turn to start products, the producers', and a warpgroup's own.
constexpr int kTurnBarrier = 1;
constexpr int kProducerBarrier = 7;
constexpr int kOwnBarrier = 8;

// No further item: what a block's list ends with.
constexpr int kNoRequest = -1;

// The steps of kTokens keys that an item visits, from its end to its begin.
template <class Config>
struct ItemSteps {
  int num_steps;
  int last;  // position of the step at the end
  int lowest;  // keys before it are visible to no row of the tile

  __device__ __forceinline__ ItemSteps(const AttentionItem& item, int window) {
    constexpr int kTokens = Config::kTokens;
    num_steps = (item.kv_end - item.kv_begin + kTokens - 1) / kTokens;
    last = item.kv_begin + (num_steps - 1) * kTokens;
    lowest = 0;
    if constexpr (Config::kWindowed) {
      lowest = max(item.offset() + item.q_tile * PrefillTile<Config>::kTileTokens - window + 1, 0);
    }
  }
  __device__ __forceinline__ int position(int step) const { return last - step * Config::kTokens; }
};

// A warpgroup's tokens of an item, and what they see.
template <class Config, class Params>
struct GroupRows {
  using Tile = PrefillTile<Config>;
  int first, end;  // tokens of the request; no row is live where first >= end
  int offset;      // position of the request's first new token
  int window_low;  // token t's window begins at key window_low + t, or no key that is there lies before it
  ColumnLimits by_all, by_any;

  __device__ __forceinline__ GroupRows(const Params& params, const AttentionItem& item, int warpgroup) {
    first = item.q_tile * Tile::kTileTokens + warpgroup * Tile::kGroupTokens;
    end = min(first + Tile::kGroupTokens, item.q_len);
    const int last = max(end - 1, first);
    offset = item.offset();
    const int first_position = query_position(first, item.q_len, item.kv_len);
    const int last_position = query_position(last, item.q_len, item.kv_len);
    by_all = rule(params).seen_by_all(first_position, last_position, item.kv_len);
    by_any = rule(params).seen_by_any(first_position, last_position, item.kv_len);
    window_low = by_all.low - last;
    by_all.high = min(by_all.high, item.kv_end);
    by_any.high = min(by_any.high, item.kv_end);
    if constexpr (Config::kLevels) by_all.low = max(by_all.low, item.kv_first);
    if constexpr (Config::kMask == kMaskNew) by_all.high = min(by_all.high, item.offset());
    if constexpr (Config::kMask == kMaskKv) by_all.high = 0;
  }

  static __device__ __forceinline__ ColumnRule rule(const Params& params) {
    return {Config::kCausal, Config::kWindowed ? params.window : kNoWindow};
  }
};

}  // namespace fi
