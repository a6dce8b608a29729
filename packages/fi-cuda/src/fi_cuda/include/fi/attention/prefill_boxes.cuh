// Keys and values of prefill as boxes of tensor maps: ragged ones, and pages of 8 tokens and more. One warp issues them, or one
// those of keys and another those of values.
#pragma once

#include "fi/attention/prefill_table.cuh"
#include "fi/ptx/tma.cuh"

namespace fi {

// The maps' dims: page (ragged: one), KV head, token, element. A box has a head's tokens of one page; lane l copies a step's
// box number l.
template <class Config, class Params>
class BoxCopies {
  using Tile = PrefillTile<Config>;
  using Shared = PrefillShared<Config>;
  static constexpr bool kPaged = Config::kTable != kRagged;
  static constexpr int kBoxTokens = Config::kBoxTokens;
  static constexpr int kPageSize = kPaged ? Config::kPageSize : kBoxTokens;
  static constexpr int kBoxes = Config::kTokens / kBoxTokens;
  static constexpr int kBoxBytes = kBoxTokens * kBoxRowBytes;
  static_assert(Config::kTokens % kBoxTokens == 0 && kBoxes <= kWarpThreads && kBoxTokens % 8 == 0);
  static_assert(kPageSize % kBoxTokens == 0, "a box lies in one page");

 public:
  static constexpr int kWarps = Config::kCopyOrder == kApart ? 2 : 1;
  static constexpr int kKeyArrivals = 1, kValueArrivals = 1;
  using Place = int;  // the page of a lane's box of a step

  __device__ __forceinline__ BoxCopies(const Params& params, const ptx::TensorMap& keys, const ptx::TensorMap& values)
      : params_(params), keys_(keys), values_(values), lane_(static_cast<int>(threadIdx.x) % kWarpThreads) {}

  __device__ __forceinline__ void enter(const AttentionItem& item, const ItemSteps<Config>& steps) {
    table_ = RequestTable<Config, Params>(params_, item.request);
    kv_head_ = item.kv_head;
    kv_end_ = item.kv_end;
    last_ = steps.last;
    lowest_ = steps.lowest;
  }

  // The page of this lane's box of a step.
  __device__ __forceinline__ int place_of(int step) const {
    if constexpr (!kPaged) return 0;
    const int position = position_of(step);
    return is_copied(position) ? table_.entries[position / kPageSize] : 0;
  }

  __device__ __forceinline__ void load_keys(Shared& shared, int step, int page) {
    load<Config::kHeadDim, Tile::kBoxElements>(keys_, shared.keys[key_.stage], shared.key_ring, key_, step, page);
  }
  __device__ __forceinline__ void load_values(Shared& shared, int step, int page) {
    load<Config::kHeadDimVo, Tile::kBoxElements>(values_, shared.values[value_.stage], shared.value_ring, value_, step, page);
  }

  // Bytes as they are stored, to the ring where they land.
  template <class Ring, class Cursor>
  __device__ __forceinline__ void land_keys(unsigned char* stage, Ring& ring, Cursor& cursor, int step, int page) {
    load<Config::kHeadDim, kBoxRowBytes>(keys_, stage, ring, cursor, step, page);
  }
  template <class Ring, class Cursor>
  __device__ __forceinline__ void land_values(unsigned char* stage, Ring& ring, Cursor& cursor, int step, int page) {
    load<Config::kHeadDimVo, kBoxRowBytes>(values_, stage, ring, cursor, step, page);
  }

 private:
  __device__ __forceinline__ int position_of(int step) const { return last_ - step * Config::kTokens + lane_ * kBoxTokens; }
  // Boxes without a readable token are left out.
  __device__ __forceinline__ bool is_copied(int position) const {
    return lane_ < kBoxes && position < kv_end_ && position + kBoxTokens > lowest_;
  }

  // Rows of kDim elements, of which a box has kBoxElements.
  template <int kDim, int kBoxElements, int kStages>
  __device__ __forceinline__ void load(const ptx::TensorMap& map, unsigned char* stage, Ring<kStages>& ring,
                                       RingCursor<kStages>& cursor, int step, int page) {
    constexpr int kColumns = (kDim + kBoxElements - 1) / kBoxElements;
    const int position = position_of(step);
    const bool copied = is_copied(position);
    const int num_boxes = __popc(__ballot_sync(0xffffffffu, copied));
    ring.acquire(cursor);
    if (lane_ == 0) ring.expect(cursor, num_boxes * kColumns * kBoxBytes);
    __syncwarp();  // bytes are expected before they come
    if (copied) {
      const int token = kPaged ? position % kPageSize : table_.first_row + position;
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        ptx::tma_load_4d(stage + column * Tile::kKeyColumnBytes + lane_ * kBoxBytes, &map, &ring.full[cursor.stage],
                         column * kBoxElements, token, kv_head_, page);
      }
    }
    cursor.advance();
  }

  const Params& params_;
  const ptx::TensorMap& keys_;
  const ptx::TensorMap& values_;
  const int lane_;
  RequestTable<Config, Params> table_;
  int kv_head_ = 0, kv_end_ = 0, last_ = 0, lowest_ = 0;
  RingCursor<Config::kKeyStages> key_ = RingCursor<Config::kKeyStages>::producer();
  RingCursor<Config::kValueStages> value_ = RingCursor<Config::kValueStages>::producer();
};

}  // namespace fi
