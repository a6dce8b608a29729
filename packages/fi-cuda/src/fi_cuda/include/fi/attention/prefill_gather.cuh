// Keys and values of prefill gathered row by row, as they are stored: pages of any size, and caches that no tensor map
// describes. A whole warpgroup copies, 16 bytes at a time, straight to where the copy engine's swizzle would have put them.
#pragma once

#include "fi/attention/prefill_table.cuh"
#include "fi/ptx/bulk_copy.cuh"
#include "fi/ptx/cp_async.cuh"
#include "fi/tile/swizzle.cuh"

namespace fi {

// A lane looks up one row of its warp's a step; a look-up is on its way for a step before its rows are copied, keys' and values'
// from the same one. Producers have few registers: what a row needs is computed when its turn comes.
template <class Config, class Params>
class GatherCopies {
  using Tile = PrefillTile<Config>;
  using Shared = PrefillShared<Config>;
  using Factor = typename Tile::Factor;
  static constexpr bool kPaged = Config::kTable != kRagged;
  static constexpr int kPageSize = kPaged ? Config::kPageSize : 1;
  static constexpr int kUnits = kBoxRowBytes / 16;  // lanes that copy a row's part of a column
  static constexpr int kRowsAtOnce = kWarpThreads / kUnits;
  static constexpr int kUnitElements = 16 / static_cast<int>(sizeof(Factor));
  static constexpr int kTokens = Config::kTokens;
  static constexpr bool kOneCursor = Config::kCopyOrder != kKeysAhead && Config::kKeyStages == Config::kValueStages;
  static constexpr bool kSameToken = kRowsAtOnce % kPageSize == 0;  // of its page, in all of a thread's rows
  static constexpr int kNone = -1;  // in the place of a page: a row that is not readable, which becomes zeros

 public:
  static constexpr int kWarps = kWarpgroupThreads / kWarpThreads;
  static constexpr int kKeyArrivals = kWarps, kValueArrivals = kWarps;
  using Place = int;  // the page (ragged: row) of a row that a lane looks up

 private:
  static constexpr int kCluster = Tile::kCluster;
  static constexpr int kWarpRows = kTokens / kWarps / kCluster;
  static constexpr int kRounds = kWarpRows / kRowsAtOnce;
  static_assert(kTokens % (kCluster * kWarps * kRowsAtOnce) == 0 && kRounds <= kUnits, "a lane looks up one row a step");
  static constexpr unsigned kWarpBytes = kWarpRows * kBoxRowBytes;  // of a column
  static_assert(sizeof(typename Config::Stored) == sizeof(Factor));

 public:
  __device__ __forceinline__ explicit GatherCopies(const Params& params) : params_(params) {}

  __device__ __forceinline__ void enter(const AttentionItem& item, const ItemSteps<Config>& steps) {
    table_ = RequestTable<Config, Params>(params_, item.request);
    const int element = thread_anew() % kUnits * kUnitElements;
    keys_ = static_cast<const Factor*>(params_.k) + item.kv_head * params_.k_stride_head + element;
    values_ = static_cast<const Factor*>(params_.v) + item.kv_head * params_.v_stride_head + element;
    kv_end_ = item.kv_end;
    last_ = steps.last;
    lowest_ = steps.lowest;
  }

  // The page (ragged: row) of one of the rows that this lane and its seven neighbours copy: unit u of them has that of round u.
  __device__ __forceinline__ int place_of(int step) const {
    const int thread = thread_anew(), round = thread % kUnits;
    const int position = position_of(step, thread) + round * kRowsAtOnce;
    if (round >= kRounds) return kNone;
    if (position < lowest_ || position >= kv_end_) return kNone;
    return kPaged ? table_.entries[position / kPageSize] : table_.first_row + position;
  }

  // The last copies of an item.
  __device__ __forceinline__ void leave() {
    if (pending_ != nullptr) pass_on<0>();
    pending_ = nullptr;
  }

  __device__ __forceinline__ void load_keys(Shared& shared, int step, int place) {
    load<Config::kHeadDim>(keys_, kPaged ? params_.k_stride_page : params_.k_stride_token, params_.k_stride_token,
                           shared.keys[key_.stage], shared.key_ring, key_, step, place);
    if constexpr (!kOneCursor) key_.advance();
  }
  __device__ __forceinline__ void load_values(Shared& shared, int step, int place) {
    load<Config::kHeadDimVo>(values_, kPaged ? params_.v_stride_page : params_.v_stride_token, params_.v_stride_token,
                             shared.values[value_place().stage], shared.value_ring, value_place(), step, place);
    value_place().advance();
  }

 private:
  // A thread's row of round 0, within a step: a cluster's blocks copy a part of it each.
  static __device__ __forceinline__ int row_of(int thread) {
    return warp_row(thread) + thread % kWarpThreads / kUnits;
  }
  static __device__ __forceinline__ int warp_row(int thread) {
    int warp = thread / kWarpThreads;
    if constexpr (kCluster > 1) warp += static_cast<int>(ptx::rank_in_cluster_again()) * kWarps;
    return warp * kWarpRows;
  }
  __device__ __forceinline__ int position_of(int step, int thread) const { return last_ - step * kTokens + row_of(thread); }

  __device__ __forceinline__ auto& value_place() {
    if constexpr (kOneCursor) return key_;
    else return value_;
  }

  // A stage is full once its threads have seen their copies arrive and shown them to the products: consumers need no fence of their
  // own, which stood in their way from one product to the next. kLeft: 1 if other copies were started since.
  template <int kLeft>
  __device__ __forceinline__ void pass_on() {
    ptx::cp_async_wait<kLeft>();
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if constexpr (kCluster > 1) {
      pass_to_neighbour();
    } else {
      if (threadIdx.x % kWarpThreads == 0) ptx::arrive(pending_);
    }
  }

  // The warp's rows also to the same place of the other block, whose warp brings as many of its own here. A stage is written to
  // once it is free in both, and is free once its bytes were there.
  __device__ __forceinline__ void pass_to_neighbour() {
    if (threadIdx.x % kWarpThreads != 0) return;
    const unsigned other = ptx::rank_in_cluster_again() ^ 1u;
    const unsigned char* rows = pending_stage_ + warp_row(thread_anew()) * kBoxRowBytes;
    const unsigned to = ptx::address_in_cluster(rows, other), full = ptx::address_in_cluster(pending_, other);
#pragma unroll
    for (int column = 0; column < Tile::kKeyColumns; ++column) {
      const int offset = column * Tile::kKeyColumnBytes;
      ptx::bulk_copy_to_neighbour(to + offset, rows + offset, kWarpBytes, full);
    }
    ptx::arrive_and_expect_bytes(pending_, Tile::kKeyColumns * kWarpBytes);
  }

  template <int kDim, int kStages>
  __device__ __forceinline__ void load(const Factor* from, int64 page_stride, int64 token_stride, unsigned char* stage,
                                       Ring<kStages>& ring, const RingCursor<kStages>& cursor, int step, int place) {
    // Consumers must not wait for copies that are there until the next stage is free.
    if (pending_ != nullptr && !__all_sync(0xffffffffu, ring.is_free(cursor))) leave();
    ring.acquire(cursor);
    const int thread = thread_anew(), unit = thread % kUnits;
    int64 page_bytes = page_stride * sizeof(Factor), token_bytes = token_stride * sizeof(Factor);
    asm volatile("" : "+l"(page_bytes), "+l"(token_bytes));  // kept from step to step they would take registers too
    const unsigned position = position_of(step, thread) + (kSameToken ? 0 : unit * kRowsAtOnce);
    const int token = position % kPageSize;  // of the row that is looked up here; else of all of the thread's rows
    const unsigned char* first = reinterpret_cast<const unsigned char*>(from);
    if constexpr (kSameToken) first += token * token_bytes;
    const int offset = swizzled<kBoxRowBytes>(row_of(thread) * kBoxRowBytes + unit * 16);
    unsigned char* even = stage + offset;
    unsigned char* odd = stage + (offset ^ 64);  // four rows further on the pattern has its other half
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int page = __shfl_sync(0xffffffffu, place, round, kUnits);
      const bool readable = page != kNone;
      const unsigned char* row = first + static_cast<unsigned>(readable ? page : 0) * page_bytes;
      if constexpr (!kSameToken) row += static_cast<unsigned>(__shfl_sync(0xffffffffu, token, round, kUnits)) * token_bytes;
      unsigned char* to = (round % 2 == 0 ? even : odd) + round * kRowsAtOnce * kBoxRowBytes;
#pragma unroll
      for (int column = 0; column * Tile::kBoxElements < kDim; ++column) {
        if (column * Tile::kBoxElements + unit * kUnitElements < kDim) {
          ptx::cp_async_16(to + column * Tile::kKeyColumnBytes, row + column * kBoxRowBytes, readable);
        }
      }
    }
    ptx::cp_async_commit();
    if (pending_ != nullptr) pass_on<1>();
    pending_ = &ring.full[cursor.stage];
    if constexpr (kCluster > 1) pending_stage_ = stage;
  }

  const Params& params_;
  RequestTable<Config, Params> table_;
  const Factor *keys_ = nullptr, *values_ = nullptr;
  int kv_end_ = 0, last_ = 0, lowest_ = 0;
  unsigned long long* pending_ = nullptr;  // the barrier of the stage whose copies are under way
  unsigned char* pending_stage_ = nullptr;
  RingCursor<Config::kKeyStages> key_ = RingCursor<Config::kKeyStages>::producer();
  RingCursor<Config::kValueStages> value_ = RingCursor<Config::kValueStages>::producer();
};

}  // namespace fi
