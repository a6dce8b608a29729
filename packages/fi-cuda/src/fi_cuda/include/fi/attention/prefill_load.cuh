// The producer of prefill: brings a worker's items, their queries, keys and values into shared memory.
#pragma once

#include "fi/attention/list_load.cuh"
#include "fi/attention/order.cuh"
#include "fi/attention/prefill_copies.cuh"

namespace fi {

template <class Config, class Params, class Copies>
class PrefillLoader : ListLoader<Config, Params, Copies> {
  using Base = ListLoader<Config, Params, Copies>;
  using typename Base::Shared;
  using typename Base::Tile;
  using Base::copies_, Base::is_first_, Base::item_, Base::kColumns, Base::lane, Base::params_, Base::queries_, Base::query_,
      Base::shared_;
  static constexpr bool kRuns = kGathered<Config> && Config::kBoxTokens > 0;
  static constexpr bool kHasDense = kGathered<Config> && Config::kDenseTiles > 0;
  // Of an item's row.
  static constexpr int kHeadColumn = 1, kSlotColumn = 6, kQLenColumn = 9, kMergeColumn = 11, kFirstPieceColumn = 12, kSlotsColumn = 15;

 public:
  __device__ __forceinline__ PrefillLoader(const Params& params, const ptx::TensorMap& queries, const Copies& copies, Shared& shared)
      : Base(params, queries, copies, shared) {}

  __device__ __forceinline__ void run() {
    if (static_cast<const OrderHeader*>(params_.order)->is_used) take_tiles();
    else work_through_share();
    if constexpr (kGathered<Config>) copies_.leave(shared_);
    if constexpr (kHasDense) end_dense_copies(params_);
    if (is_first_) Base::end_list();
  }

 private:
  // The longest tile left, again and again; a row of the list is a tile of every KV head, which stand side by side.
  __device__ __forceinline__ void take_tiles() {
    const int* rows = static_cast<const int*>(params_.order_items);
    const int num_heads = params_.num_kv_heads;
    const int total = static_cast<const OrderHeader*>(params_.order)->num_rows * num_heads;
    const auto row_of = [&](int tile) {
      return tile < total ? rows[static_cast<int64>(tile / num_heads) * kColumns + thread_anew() % kColumns] : 0;
    };
    int tile = static_cast<int>(blockIdx.x);
    int mine = row_of(tile);
    if constexpr (kHasDense) {
      if (lane() == 0) shared_.looked_up.dense_ahead[thread_anew() / kWarpThreads] = {};
      __syncwarp();
    }
#pragma unroll 1
    while (tile < total) {
      OrderHeader* order = static_cast<OrderHeader*>(params_.order);
      asm volatile("" : "+l"(order));  // kept from tile to tile it would take registers
      const int next = Base::told(Base::asked(order->taken), order->taken, total);
      const int its_row = row_of(next);
      load_item<kHasDense>(of_head(mine, tile % num_heads), [&] {
        const int q_len = __shfl_sync(0xffffffffu, its_row, kQLenColumn);
        if (q_len >= Config::kDenseTiles * Tile::kTileTokens) {
          look_ahead(__shfl_sync(0xffffffffu, its_row, 0) * num_heads + next % num_heads);
        }
      });
      tile = next;
      mine = its_row;
    }
  }

  // A row of the order for one of its heads. It has the slots of head 0, where the tile is in pieces.
  __device__ __forceinline__ int of_head(int value, int head) const {
    const int column = thread_anew() % kColumns;
    if (column == kHeadColumn) value = head;
    if constexpr (Config::kInPieces) {
      const int slots = __shfl_sync(0xffffffffu, value, kSlotsColumn);
      if (column == kSlotColumn || (column >= kFirstPieceColumn && column < kSlotsColumn)) value += head * slots;
      if (column == kMergeColumn && slots > 0) value += head;
      if (column == kSlotsColumn) value = 0;
    }
    return value;
  }

  __device__ __forceinline__ void work_through_share() {
    const WorkerStart* start = static_cast<const WorkerStart*>(params_.starts) + blockIdx.x;
    const int* rows = static_cast<const int*>(params_.items);
    const int begin = start->begin, end = start->end, column = lane() % kColumns;
    int mine = reinterpret_cast<const int*>(&start->first)[column];
#pragma unroll 1
    for (int idx = begin; idx < end; ++idx) {
      const int next = rows[static_cast<int64>(min(idx + 1, end - 1)) * kColumns + column];
      load_item<false>(mine, [] {});
      mine = next;
    }
  }

  // Finds the dense copy of the next item's owner, while an answer's time is not yet waited for.
  __device__ __forceinline__ void look_ahead(int owner) {
    if constexpr (kHasDense) {
      if (shared_.looked_up.dense[thread_anew() / kWarpThreads].is_in_order) return;  // as the next one probably is
      const unsigned long long record = find_dense(params_, owner);
      if (lane() == 0) shared_.looked_up.dense_ahead[thread_anew() / kWarpThreads] = {record, owner};
      __syncwarp();
    }
  }

  // kShares: keys and values with other tiles of the request, by dense copies; calls look_ahead behind the copies of the last step but one.
  template <bool kShares, class LookAhead>
  __device__ __forceinline__ void load_item(int value, LookAhead look_ahead) {
    AttentionItem item;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      reinterpret_cast<int*>(&item)[column] = __shfl_sync(0xffffffffu, value, column);
    }
    if (is_first_) load_queries(item, value);
    query_.advance();
    item_.advance();
    const ItemSteps<Config> steps(item, params_.window);
    copies_.enter(item, steps);
    if constexpr (Tile::kLanded) copies_.load(shared_, steps.num_steps);
    else if constexpr (Config::kCopyOrder == kApart) load_apart(steps.num_steps);
    else if constexpr (Config::kCopyOrder == kKeysAhead) load_keys_ahead(steps.num_steps);
    else if constexpr (kShares) load_with_others(item, steps, look_ahead);
    else load_in_order(steps.num_steps, first_place(), look_ahead);
  }

  // The place of an item's first step. While it is looked up the last copies of the item before arrive.
  __device__ __forceinline__ auto first_place() {
    const auto place = copies_.place_of(0);
    if constexpr (kGathered<Config>) copies_.leave(shared_);
    return place;
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
  template <class Place, class LookAhead>
  __device__ __forceinline__ void load_in_order(int num_steps, Place place, LookAhead look_ahead) {
    int step = 0;
    load_by_row(step, num_steps, num_steps, place, look_ahead);
  }

  // Steps before `end` of `num_steps`. From an item's second step on, if that one is a run in memory, runs are looked for, else not.
  template <class Place, class LookAhead>
  __device__ __forceinline__ void load_by_row(int& step, int end, int num_steps, Place& place, LookAhead look_ahead) {
#pragma unroll 1
    for (; step < end; ++step) {
      if constexpr (kRuns) {
        if (step < 2) copies_.look_for_runs(shared_, step == 1 && Copies::is_run(place));
      }
      const auto next = copies_.place_of(step + (step + 1 < num_steps));
      copies_.load_keys(shared_, step, place);
      copies_.load_values(shared_, step, place);
      if (step + 1 + (num_steps > 1) == num_steps) look_ahead();
      place = next;
    }
  }

  template <class LookAhead>
  __device__ __forceinline__ void load_with_others(const AttentionItem& item, const ItemSteps<Config>& steps, LookAhead look_ahead) {
    auto place = copies_.place_of(0);  // for what no copy has of the first step
    const DensePlace<Config> dense(params_, item, steps, shared_.looked_up.dense_ahead[thread_anew() / kWarpThreads],
                                   [&] { return !kRuns || !Copies::is_run(copies_.place_of(min(1, steps.num_steps - 1))); });
    copies_.leave(shared_);
    copies_.begin_dense(shared_, dense);
    const int by_row = !dense.is_read ? steps.num_steps : !copies_.is_before(dense.end, 0);
    int step = 0;
    load_by_row(step, by_row, steps.num_steps, place, look_ahead);
#pragma unroll 1
    for (; step < steps.num_steps; ++step) {
      copies_.template load_keys<true>(shared_, step, place);
      copies_.template load_values<true>(shared_, step, place);
      if (step + 1 + (steps.num_steps > 1) == steps.num_steps) look_ahead();
    }
    copies_.end_dense(shared_);
  }

  // ... or before them those of the next step, as overlapped steps need them.
  __device__ __forceinline__ void load_keys_ahead(int num_steps) {
    auto place = first_place(), before = place;
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
    Base::put_item(value);
    if (lane() == 0) {
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
  }
};

}  // namespace fi
