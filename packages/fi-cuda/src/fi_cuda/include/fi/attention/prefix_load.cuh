// The producer of attention with shared prefixes: takes tiles from the list and brings their queries, keys and values.
#pragma once

#include "fi/attention/list_load.cuh"
#include "fi/attention/prefill_copies.cuh"
#include "fi/attention/prefix_list.cuh"

namespace fi {

// Copies: as for PrefillLoader. The tokens of a node lie anywhere, so queries come a token at a time; rows past a tile's tokens
// hold what was there before and reach no result.
template <class Config, class Params, class Copies>
class PrefixLoader : ListLoader<Config, Params, Copies> {
  using Base = ListLoader<Config, Params, Copies>;
  using typename Base::Shared;
  using typename Base::Tile;
  using Base::copies_, Base::is_first_, Base::item_, Base::kColumns, Base::lane, Base::params_, Base::queries_, Base::query_,
      Base::shared_;
  static constexpr int kHeadColumn = 1;  // of an item's row

 public:
  __device__ __forceinline__ PrefixLoader(const Params& params, const ptx::TensorMap& queries, const Copies& copies, Shared& shared)
      : Base(params, queries, copies, shared) {}

  // The next tile of the list, again and again; heads of a row stand side by side.
  __device__ __forceinline__ void run() {
    const int* rows = static_cast<const int*>(params_.rows);
    const int num_heads = params_.num_kv_heads;
    const auto with_head = [&](int tile, int row) { return lane() % kColumns == kHeadColumn ? tile % num_heads : row; };
    // There is room for a row of every block, so the first is read beside the list's length.
    int tile = static_cast<int>(blockIdx.x);
    int mine = rows[static_cast<int64>(tile / num_heads) * kColumns + lane() % kColumns];
    const int total = static_cast<const PrefixHeader*>(params_.header)->num_rows * num_heads;
    const auto row_of = [&](int tile) {
      return tile < total ? rows[static_cast<int64>(tile / num_heads) * kColumns + lane() % kColumns] : 0;
    };
    if constexpr (Tile::kLanded) {
      // Producers that change what landed have no registers to look further ahead.
#pragma unroll 1
      while (tile < total) {
        const int next = Base::told(Base::asked(counter()), counter(), total), its_row = row_of(next);
        load_landed(with_head(tile, mine));
        tile = next;
        mine = its_row;
      }
    } else if (tile < total) {
      int answer = Base::asked(counter()), next = 0, its_row = 0;
      auto place = first_place(with_head(tile, mine));
      // Told while the tile's first keys are under way, and at once asked again: an answer takes as long as a step's keys.
      const auto look_ahead = [&] {
        next = Base::told(answer, counter(), total);
        its_row = row_of(next);
        answer = next < total ? Base::asked(counter()) : 0;
      };
#pragma unroll 1
      while (true) {
        load_item(with_head(tile, mine), place, look_ahead, [&] {
          if (next < total) place = first_place(with_head(next, its_row));
        });
        if (next >= total) break;
        tile = next;
        mine = its_row;
      }
    }
    if (is_first_) Base::end_list();
  }

 private:
  __device__ __forceinline__ int& counter() const { return static_cast<PrefixHeader*>(params_.header)->taken; }

  // What the copies need of an item's row.
  __device__ __forceinline__ AttentionItem copied(int value) const {
    AttentionItem item = {};
    item.request = __shfl_sync(0xffffffffu, value, 0);
    item.kv_head = __shfl_sync(0xffffffffu, value, kHeadColumn);
    item.kv_begin = __shfl_sync(0xffffffffu, value, 4);
    item.kv_end = __shfl_sync(0xffffffffu, value, 5);
    return item;
  }

  __device__ __forceinline__ void load_landed(int value) {
    if (is_first_) load_queries(value);
    query_.advance();
    item_.advance();
    const AttentionItem item = copied(value);
    const ItemSteps<Config> steps(item, params_.window);
    copies_.enter(item, steps);
    copies_.load(shared_, steps.num_steps);
  }

  // Where an item's first step is copied from.
  __device__ __forceinline__ auto first_place(int value) const {
    const AttentionItem item = copied(value);
    Copies ahead = copies_;
    ahead.enter(item, ItemSteps<Config>(item, params_.window));
    return ahead.place_of(0);
  }

  // Loads an item whose first step is copied from `place`. `find_next`, some time after `look_ahead` and before the item's last values
  // are waited for, makes `place` the next one's.
  template <class Place, class LookAhead, class FindNext>
  __device__ __forceinline__ void load_item(int value, Place& place, LookAhead look_ahead, FindNext find_next) {
    if (is_first_) load_queries(value);
    query_.advance();
    item_.advance();
    const AttentionItem item = copied(value);
    const ItemSteps<Config> steps(item, params_.window);
    copies_.enter(item, steps);
    Place before = place;
    if (steps.num_steps > 0) {
      place = copies_.place_of(min(1, steps.num_steps - 1));
      copies_.load_keys(shared_, 0, before);
    }
    look_ahead();
#pragma unroll 1
    for (int step = 1; step < steps.num_steps; ++step) {
      const Place next = copies_.place_of(min(step + 1, steps.num_steps - 1));
      copies_.load_keys(shared_, step, place);
      copies_.load_values(shared_, step - 1, before);
      before = place;
      place = next;
    }
    find_next();
    if (steps.num_steps > 0) copies_.load_values(shared_, steps.num_steps - 1, before);
    if constexpr (kGathered<Config>) copies_.leave(shared_);
  }

  // The item is read from where it is put: a producer's thread has few registers.
  __device__ __forceinline__ void load_queries(int value) {
    Base::put_item(value);
    const AttentionItem& item = shared_.items[item_.stage];
    __syncwarp();
    const int count = min(item.q_len - item.q_tile * Tile::kTileTokens, Tile::kTileTokens);
    if (lane() == 0) shared_.query_ring.expect(query_, count * Tile::kKeyColumns * Tile::kGroup * kBoxRowBytes);
    __syncwarp();  // bytes are expected before they come
#pragma unroll 1
    for (int idx = lane(); idx < count; idx += kWarpThreads) {
      int token = item.q_begin + item.q_tile * Tile::kTileTokens + idx;
      if (item.kind == kNodeItem) token = static_cast<const int*>(params_.tokens)[token];
      unsigned char* to = shared_.queries[query_.stage][idx / Tile::kGroupTokens] +
                          idx % Tile::kGroupTokens * (Tile::kGroup * kBoxRowBytes);
#pragma unroll
      for (int column = 0; column < Tile::kKeyColumns; ++column) {
        ptx::tma_load_3d(to + column * Tile::kQueryColumnBytes, &queries_, &shared_.query_ring.full[query_.stage],
                         column * Tile::kBoxElements, item.kv_head * Tile::kGroup, token);
      }
    }
  }
};

}  // namespace fi
