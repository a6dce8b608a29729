// The producer of attention with shared prefixes: takes tiles from the list and brings their queries, keys and values.
#pragma once

#include "fi/attention/prefill_copies.cuh"
#include "fi/attention/prefix_list.cuh"
#include "fi/ptx/named_barrier.cuh"
#include "fi/ptx/tma.cuh"

namespace fi {

// Copies: as for PrefillLoader. The tokens of a node lie anywhere, so queries come a token at a time
// (map: token, head, element); rows past a tile's tokens hold what was there before and reach no result.
template <class Config, class Params, class Copies>
class PrefixLoader {
  using Tile = PrefillTile<Config>;
  using Shared = PrefillShared<Config>;
  static constexpr int kColumns = sizeof(AttentionItem) / sizeof(int);
  static constexpr int kHeadColumn = 1;  // of an item's row

 public:
  __device__ __forceinline__ PrefixLoader(const Params& params, const ptx::TensorMap& queries, const Copies& copies, Shared& shared)
      : params_(params), queries_(queries), copies_(copies), shared_(shared),
        lane_(static_cast<int>(threadIdx.x) % kWarpThreads), is_first_(warp_idx() == 0) {}

  // The next tile of the list, again and again; heads of a row stand side by side.
  __device__ __forceinline__ void run() {
    const int* rows = static_cast<const int*>(params_.rows);
    const int num_heads = params_.num_kv_heads;
    const int total = static_cast<const PrefixHeader*>(params_.header)->num_rows * num_heads;
    const auto row_of = [&](int tile) {
      return tile < total ? rows[static_cast<int64>(tile / num_heads) * kColumns + lane_ % kColumns] : 0;
    };
    const auto with_head = [&](int tile, int row) { return lane_ % kColumns == kHeadColumn ? tile % num_heads : row; };
    int tile = static_cast<int>(blockIdx.x);
    if (tile < total) {
      int mine = row_of(tile);
      int next = told(asked(), total);
      int its_row = row_of(next);
      auto place = first_place(with_head(tile, mine));
#pragma unroll 1
      while (true) {
        // Asked for while this tile is loaded: the answer takes as long as a step's keys.
        const int answer = next < total ? asked() : 0;
        place = load_item(with_head(tile, mine), with_head(next, its_row), next < total, place);
        if (next >= total) break;
        tile = next;
        mine = its_row;
        next = told(answer, total);
        its_row = row_of(next);
      }
    }
    if (is_first_) end_list();
  }

 private:
  // Asks for a further tile; the first lane of the first warp knows the answer.
  __device__ __forceinline__ int asked() const {
    if (!is_first_ || lane_ != 0) return 0;
    return atomicAdd(&static_cast<PrefixHeader*>(params_.header)->taken, 1);
  }

  // What was asked for, to all. Every block that took a tile is told once that there is none, so `total` are taken in all, and the
  // last one resets.
  __device__ __forceinline__ int told(int taken, int total) {
    if (is_first_ && lane_ == 0 && taken == total - 1) static_cast<PrefixHeader*>(params_.header)->taken = 0;
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

  // What the copies need of an item's row.
  __device__ __forceinline__ AttentionItem copied(int value) const {
    AttentionItem item = {};
    item.request = __shfl_sync(0xffffffffu, value, 0);
    item.kv_head = __shfl_sync(0xffffffffu, value, kHeadColumn);
    item.kv_begin = __shfl_sync(0xffffffffu, value, 4);
    item.kv_end = __shfl_sync(0xffffffffu, value, 5);
    return item;
  }

  // Where an item's first step is copied from.
  __device__ __forceinline__ typename Copies::Place first_place(int value) const {
    const AttentionItem item = copied(value);
    Copies ahead = copies_;
    ahead.enter(item, ItemSteps<Config>(item, params_.window));
    return ahead.place_of(0);
  }

  // Loads an item whose first step is copied from `place`; returns the next one's, looked up before this one's last values are
  // waited for.
  __device__ __forceinline__ typename Copies::Place load_item(int value, int next_value, bool has_next, typename Copies::Place place) {
    if (is_first_) load_queries(value);
    const AttentionItem item = copied(value);
    const ItemSteps<Config> steps(item, params_.window);
    copies_.enter(item, steps);
    auto before = place;
#pragma unroll 1
    for (int step = 0; step < steps.num_steps; ++step) {
      const auto next = copies_.place_of(min(step + 1, steps.num_steps - 1));
      copies_.load_keys(shared_, step, place);
      if (step > 0) copies_.load_values(shared_, step - 1, before);
      before = place;
      place = next;
    }
    if (has_next) place = first_place(next_value);
    if (steps.num_steps > 0) copies_.load_values(shared_, steps.num_steps - 1, before);
    if constexpr (kGathered<Config>) copies_.leave();
    return place;
  }

  // The item is read from where it is put: a producer's thread has few registers.
  __device__ __forceinline__ void load_queries(int value) {
    shared_.query_ring.acquire(query_);
    const AttentionItem& item = shared_.items[item_.stage];
    if (lane_ < kColumns) reinterpret_cast<int*>(&shared_.items[item_.stage])[lane_] = value;
    __syncwarp();
    const int count = min(item.q_len - item.q_tile * Tile::kTileTokens, Tile::kTileTokens);
    if (lane_ == 0) shared_.query_ring.expect(query_, count * Tile::kKeyColumns * Tile::kGroup * kBoxRowBytes);
    __syncwarp();  // bytes are expected before they come
#pragma unroll 1
    for (int idx = lane_; idx < count; idx += kWarpThreads) {
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
    query_.advance();
    item_.advance();
  }

  __device__ __forceinline__ void end_list() {
    shared_.query_ring.acquire(query_);
    if (lane_ == 0) {
      shared_.items[item_.stage].request = kNoRequest;
      ptx::arrive(&shared_.query_ring.full[query_.stage]);
    }
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
