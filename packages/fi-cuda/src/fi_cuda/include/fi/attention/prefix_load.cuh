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
    int tile = static_cast<int>(blockIdx.x);
    int mine = row_of(tile);
#pragma unroll 1
    while (tile < total) {
      const int next = next_tile(total);
      const int its_row = row_of(next);
      load_item(lane_ % kColumns == kHeadColumn ? tile % num_heads : mine);
      tile = next;
      mine = its_row;
    }
    if (is_first_) end_list();
  }

 private:
  // Every block that took a tile is told once that there is none, so `total` are taken in all, and the last one resets.
  __device__ __forceinline__ int next_tile(int total) {
    int taken = 0;
    if (is_first_ && lane_ == 0) {
      int* counter = &static_cast<PrefixHeader*>(params_.header)->taken;
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

  __device__ __forceinline__ void load_item(int value) {
    if (is_first_) load_queries(value);
    AttentionItem item;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      reinterpret_cast<int*>(&item)[column] = __shfl_sync(0xffffffffu, value, column);
    }
    const ItemSteps<Config> steps(item, params_.window);
    copies_.enter(item, steps);
    auto place = copies_.place_of(0), before = place;
#pragma unroll 1
    for (int step = 0; step < steps.num_steps; ++step) {
      const auto next = copies_.place_of(min(step + 1, steps.num_steps - 1));
      copies_.load_keys(shared_, step, place);
      if (step > 0) copies_.load_values(shared_, step - 1, before);
      before = place;
      place = next;
    }
    if (steps.num_steps > 0) copies_.load_values(shared_, steps.num_steps - 1, before);
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
