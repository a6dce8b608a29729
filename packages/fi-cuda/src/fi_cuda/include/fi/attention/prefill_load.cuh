// The producer of prefill: brings a worker's items, their queries, keys and values into shared memory.
#pragma once

#include "fi/attention/order.cuh"
#include "fi/attention/prefill_copies.cuh"
#include "fi/ptx/named_barrier.cuh"
#include "fi/ptx/tma.cuh"

namespace fi {

// Copies: what copies_of gives. Its warps, which alone call run(), walk the list side by side; the first one brings the queries
// (map: token, head, element).
template <class Config, class Params, class Copies>
class PrefillLoader {
  using Tile = PrefillTile<Config>;
  using Shared = PrefillShared<Config>;
  static constexpr int kColumns = Shared::kRecordLanes;
  // Of an item's row.
  static constexpr int kHeadColumn = 1, kSlotColumn = 6, kMergeColumn = 11, kFirstPieceColumn = 12, kSlotsColumn = 15;

 public:
  __device__ __forceinline__ PrefillLoader(const Params& params, const ptx::TensorMap& queries, const Copies& copies, Shared& shared)
      : params_(params), queries_(queries), copies_(copies), shared_(shared),
        lane_(static_cast<int>(threadIdx.x) % kWarpThreads), is_first_(warp_idx() == 0) {}

  __device__ __forceinline__ void run() {
    if (static_cast<const OrderHeader*>(params_.order)->is_used) take_tiles();
    else work_through_share();
    if (is_first_) end_list();
  }

 private:
  // The longest tile left, again and again; a row of the list is a tile of every KV head, which stand side by side.
  __device__ __forceinline__ void take_tiles() {
    const int* rows = static_cast<const int*>(params_.order_items);
    const int num_heads = params_.num_kv_heads;
    const int total = static_cast<const OrderHeader*>(params_.order)->num_rows * num_heads;
    const auto row_of = [&](int tile) {
      return tile < total ? rows[static_cast<int64>(tile / num_heads) * kColumns + lane_ % kColumns] : 0;
    };
    int tile = static_cast<int>(blockIdx.x);
    int mine = row_of(tile);
#pragma unroll 1
    while (tile < total) {
      const int next = next_tile(total);
      const int its_row = row_of(next);
      load_item(of_head(mine, tile % num_heads));
      tile = next;
      mine = its_row;
    }
  }

  // A row of the order for one of its heads. It has the slots of head 0, where the tile is in pieces.
  __device__ __forceinline__ int of_head(int value, int head) const {
    const int column = lane_ % kColumns;
    if (column == kHeadColumn) value = head;
    if constexpr (Config::kInPieces) {
      const int slots = __shfl_sync(0xffffffffu, value, kSlotsColumn);
      if (column == kSlotColumn || (column >= kFirstPieceColumn && column < kSlotsColumn)) value += head * slots;
      if (column == kMergeColumn && slots > 0) value += head;
      if (column == kSlotsColumn) value = 0;
    }
    return value;
  }

  // Every block that took a tile is told once that there is none, so `total` are taken in all, and the last one resets.
  __device__ __forceinline__ int next_tile(int total) {
    int taken = 0;
    if (is_first_ && lane_ == 0) {
      int* counter = &static_cast<OrderHeader*>(params_.order)->taken;
      taken = atomicAdd(counter, 1);
      if (taken == total - 1) *counter = 0;
    }
    if constexpr (Copies::kWarps > 1) {
      turn_ ^= 1;  // the place before is still read
      if (is_first_ && lane_ == 0) shared_.taken[turn_] = taken;
      ptx::named_barrier_sync(kProducerBarrier, Copies::kWarps * kWarpThreads);
      taken = shared_.taken[turn_];
    } else {
      taken = __shfl_sync(0xffffffffu, taken, 0);
    }
    return static_cast<int>(gridDim.x) + taken;
  }

  __device__ __forceinline__ void work_through_share() {
    const WorkerStart* start = static_cast<const WorkerStart*>(params_.starts) + blockIdx.x;
    const int* rows = static_cast<const int*>(params_.items);
    const int begin = start->begin, end = start->end, column = lane_ % kColumns;
    int mine = reinterpret_cast<const int*>(&start->first)[column];
#pragma unroll 1
    for (int idx = begin; idx < end; ++idx) {
      const int next = rows[static_cast<int64>(min(idx + 1, end - 1)) * kColumns + column];
      load_item(mine);
      mine = next;
    }
  }

  __device__ __forceinline__ void load_item(int value) {
    AttentionItem item;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      reinterpret_cast<int*>(&item)[column] = __shfl_sync(0xffffffffu, value, column);
    }
    if (is_first_) load_queries(item, value);
    const ItemSteps<Config> steps(item, params_.window);
    copies_.enter(item, steps);
    if constexpr (Tile::kLanded) copies_.load(shared_, steps.num_steps);
    else if constexpr (Config::kCopyOrder == kApart) load_apart(steps.num_steps);
    else if constexpr (Config::kCopyOrder == kKeysAhead) load_keys_ahead(steps.num_steps);
    else load_in_order(steps.num_steps);
    if constexpr (kGathered<Config>) copies_.leave();
  }

  // Keys by one warp and values by another, each as its stages are set free ...
  __device__ __forceinline__ void load_apart(int num_steps) {
    auto place = copies_.place_of(0);
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) {
      const auto next = copies_.place_of(min(step + 1, num_steps - 1));
      if (is_first_) copies_.load_keys(shared_, step, place);
      else copies_.load_values(shared_, step, place);
      place = next;
    }
  }

  // ... or by the same: a step's keys, then its values, the order in which whole steps need stages and set them free ...
  __device__ __forceinline__ void load_in_order(int num_steps) {
    auto place = copies_.place_of(0);
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) {
      const auto next = copies_.place_of(min(step + 1, num_steps - 1));
      copies_.load_keys(shared_, step, place);
      copies_.load_values(shared_, step, place);
      place = next;
    }
  }

  // ... or before them those of the next step, as overlapped steps need them.
  __device__ __forceinline__ void load_keys_ahead(int num_steps) {
    auto place = copies_.place_of(0), before = place;
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) {
      const auto next = copies_.place_of(min(step + 1, num_steps - 1));
      copies_.load_keys(shared_, step, place);
      if (step > 0) copies_.load_values(shared_, step - 1, before);
      before = place;
      place = next;
    }
    if (num_steps > 0) copies_.load_values(shared_, num_steps - 1, before);
  }

  __device__ __forceinline__ void load_queries(const AttentionItem& item, int value) {
    shared_.query_ring.acquire(query_);
    if (lane_ < kColumns) reinterpret_cast<int*>(&shared_.items[item_.stage])[lane_] = value;
    if (0 < lane_ && lane_ < kColumns) ptx::arrive(&shared_.query_ring.full[query_.stage]);
    if (lane_ == 0) {
      constexpr int kBytes = Config::kConsumers * Tile::kKeyColumns * Tile::kGroupRows * kBoxRowBytes;
      unsigned long long* full = shared_.query_ring.expect(query_, kBytes);
#pragma unroll
      for (int group = 0; group < Config::kConsumers; ++group) {
        const int token = item.q_begin + item.q_tile * Tile::kTileTokens + group * Tile::kGroupTokens;
#pragma unroll
        for (int column = 0; column < Tile::kKeyColumns; ++column) {
          ptx::tma_load_3d(shared_.queries[query_.stage][group] + column * Tile::kQueryColumnBytes, &queries_, full,
                           column * Tile::kBoxElements, item.kv_head * Tile::kGroup, token);
        }
      }
    }
    query_.advance();
    item_.advance();
  }

  __device__ __forceinline__ void end_list() {
    shared_.query_ring.acquire(query_);
    if (lane_ == 0) shared_.items[item_.stage].request = kNoRequest;
    if (lane_ < kColumns) ptx::arrive(&shared_.query_ring.full[query_.stage]);
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
