// A warp's walk over its chunks of a list of items, with the pages that hold them looked up ahead.
#pragma once

#include "fi/attention/chunks.cuh"
#include "fi/tile/host_device.cuh"

namespace fi {

// How a warp looks up the pages of its chunks: one load gives the entries of as many chunks as its lanes can hold.
template <class Config>
struct PageLookup {
  static constexpr int kTokens = Config::kChunkTokens;
  static constexpr int kPageSize = Config::kTable == kRagged ? kTokens : Config::kPageSize;
  static constexpr bool kWholePages = kTokens % kPageSize == 0 || kPageSize % kTokens == 0;
  // Entries a chunk needs, and the tokens each is for; where pages and chunks do not fit, an entry for every token.
  static constexpr int kEntries = kWholePages ? (kPageSize < kTokens ? kTokens / kPageSize : 1) : kTokens;
  static constexpr int kEntryTokens = kTokens / kEntries;
  static constexpr int kChunks = 32 / kEntries;
};

// First visible position of the tile's first token: what lies before it is read by no row.
template <class Config>
__device__ __forceinline__ int lowest_position(const AttentionItem& item, int window) {
  if constexpr (!Config::kWindowed) return 0;
  const int first_token = item.q_tile * Config::kRows / Config::kGroupSize;
  return max(item.offset() + first_token - window + 1, 0);
}

// A request's entries of a dense table.
template <class Config, class Params>
__device__ __forceinline__ const int* dense_entries(const Params& params, int request) {
  if constexpr (Config::kTableRow) request = static_cast<const int*>(params.table_row)[request];
  return static_cast<const int*>(params.table) + request * params.table_stride;
}

template <class Config, class Params>
class ChunkWalk {
  using Lookup = PageLookup<Config>;
  static constexpr bool kPaged = Config::kTable != kRagged;
  static constexpr int kTokens = Config::kChunkTokens;
  static constexpr int kTokenWarps = WarpPlace<Config>::kTokenWarps;

 public:
  __device__ __forceinline__ ChunkWalk(const Params& params, const AttentionItem* items, int num_items)
      : params_(params), items_(items), num_items_(num_items), item_(-1), chunk_(0), num_chunks_(0), turn_{0}, held_(0),
        lane_(static_cast<int>(threadIdx.x % 32)) {
    find_chunk();
  }

  __device__ __forceinline__ bool done() const { return item_ >= num_items_; }
  __device__ __forceinline__ int lane() const { return lane_; }
  __device__ __forceinline__ int kv_head() const { return kv_head_; }
  // The chunk's first position, and the row of the ragged K and V that is the request's first.
  __device__ __forceinline__ int begin() const { return kv_begin_ + chunk_ * kTokens; }
  __device__ __forceinline__ int64 first_row() const { return first_row_; }
  // Of `count` positions from `first` on, some or all can be read: they are in the item, and not before its window.
  __device__ __forceinline__ bool some_readable(int first, int count) const {
    return first + count > lowest_ && first < kv_end_;
  }
  __device__ __forceinline__ bool all_readable(int first, int count) const {
    return first >= lowest_ && first + count <= kv_end_;
  }
  // The table's entry for the chunk's token `token`; all lanes call this together, each for a token of its own.
  __device__ __forceinline__ int page_of(int token) const {
    return __shfl_sync(0xffffffffu, page_, held_ * Lookup::kEntries + token / Lookup::kEntryTokens);
  }

  __device__ __forceinline__ void advance() {
    chunk_ += kTokenWarps;
    ++held_;
    find_chunk();
  }

 private:
  // Moves on to the next item while this warp has no chunk left in the present one, and looks up pages.
  __device__ __forceinline__ void find_chunk() {
    while (chunk_ >= num_chunks_) {
      turn_.pass(num_chunks_);
      if (++item_ >= num_items_) return;
      num_chunks_ = num_chunks_of<kTokens>(items_[item_]);
      chunk_ = turn_.first_chunk(place_.token_warp);
      if (chunk_ < num_chunks_) enter(items_[item_]);
    }
    if constexpr (kPaged) {
      if (held_ == Lookup::kChunks) look_up();
    }
  }

  __device__ __forceinline__ void enter(const AttentionItem& item) {
    kv_begin_ = item.kv_begin;
    kv_end_ = item.kv_end;
    kv_head_ = place_.own(item).kv_head;
    lowest_ = lowest_position<Config>(item, params_.window);
    held_ = Lookup::kChunks;
    if constexpr (Config::kTable == kDense) {
      entries_ = dense_entries<Config>(params_, item.request);
    } else {
      first_row_ = static_cast<const int*>(params_.kv_indptr)[item.request];
      entries_ = static_cast<const int*>(params_.table) + first_row_;
    }
  }

  // Lane l gets the entry l % kEntries of this warp's chunk number l / kEntries from the present one on. Entries of which no
  // token is readable may lie beyond the table and are not read.
  __device__ __forceinline__ void look_up() {
    held_ = 0;
    const int chunk = chunk_ + lane_ / Lookup::kEntries * kTokenWarps;
    const int first = kv_begin_ + chunk * kTokens + lane_ % Lookup::kEntries * Lookup::kEntryTokens;
    page_ = some_readable(first, Lookup::kEntryTokens) ? entries_[max(first, lowest_) / Lookup::kPageSize] : 0;
  }

  const Params& params_;
  const AttentionItem* items_;
  int num_items_;
  int item_, chunk_, num_chunks_;
  ChunkTurn<kTokenWarps> turn_;
  int held_;  // of the chunks whose pages are held, those that are behind
  int page_;
  int kv_begin_, kv_end_, kv_head_, lowest_;
  int64 first_row_;
  const int* entries_;
  int lane_;
  const WarpPlace<Config> place_;
};

}  // namespace fi
