// Keys and values of prefill row by row: pages of any size, caches that no tensor map describes, and FP8, which becomes the
// queries' type on the way. A whole warpgroup copies, 16 bytes of shared memory at a time.
#pragma once

#include "fi/attention/prefill_table.cuh"
#include "fi/ptx/cp_async.cuh"
#include "fi/ptx/fence.cuh"
#include "fi/tile/fp8.cuh"
#include "fi/tile/pack.cuh"
#include "fi/tile/swizzle.cuh"

namespace fi {

// Eight 8-bit floats as T, in two registers and four.
template <class T, class Stored>
__device__ __forceinline__ uint4 widened(uint2 bytes) {
  unsigned words[4];
#pragma unroll
  for (int idx = 0; idx < 4; ++idx) {
    const unsigned both = (idx < 2 ? bytes.x : bytes.y) >> (idx % 2 * 16);
    const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(both), kFp8Format<Stored>);
    const float2 floats = __half22float2(__half2(halves));
    words[idx] = pair_of<T>(floats.x, floats.y);
  }
  return {words[0], words[1], words[2], words[3]};
}

template <class Config, class Params>
class RowCopies {
  using Tile = PrefillTile<Config>;
  using Shared = PrefillShared<Config>;
  using Factor = typename Tile::Factor;
  using Stored = typename Config::Stored;
  static constexpr bool kPaged = Config::kTable != kRagged;
  static constexpr int kPageSize = kPaged ? Config::kPageSize : 1;
  // Eight threads copy a row's 128 bytes of a column; the warpgroup 16 rows at once. Each looks up the page of one row of eight.
  static constexpr int kUnits = kBoxRowBytes / 16;
  static constexpr int kRowsAtOnce = kWarpgroupThreads / kUnits;
  static constexpr int kRounds = Config::kTokens / kRowsAtOnce;
  static constexpr int kUnitElements = 16 / static_cast<int>(sizeof(Factor));
  static constexpr bool kConverted = sizeof(Stored) != sizeof(Factor);
  static_assert(kRounds <= kUnits, "a thread looks up one page a step");

 public:
  static constexpr int kWarps = kWarpgroupThreads / kWarpThreads;
  static constexpr int kKeyArrivals = kWarpgroupThreads, kValueArrivals = kWarpgroupThreads;
  using Place = int;  // the page of a row that a thread looks up

  __device__ __forceinline__ explicit RowCopies(const Params& params)
      : params_(params), unit_(static_cast<int>(threadIdx.x) % kUnits), row_(static_cast<int>(threadIdx.x) / kUnits) {}

  __device__ __forceinline__ void enter(const AttentionItem& item, const ItemSteps<Config>& steps) {
    table_ = RequestTable<Config, Params>(params_, item.request);
    keys_ = static_cast<const Stored*>(params_.k) + item.kv_head * params_.k_stride_head;
    values_ = static_cast<const Stored*>(params_.v) + item.kv_head * params_.v_stride_head;
    kv_end_ = item.kv_end;
    last_ = steps.last;
    lowest_ = steps.lowest;
  }

  // The page of row row_ of this thread's round, unit_.
  __device__ __forceinline__ int place_of(int step) const {
    if constexpr (!kPaged) return 0;
    const int position = position_of(step, unit_);
    return unit_ < kRounds && is_readable(position) ? table_.entries[position / kPageSize] : 0;
  }

  __device__ __forceinline__ void load_keys(Shared& shared, int step, int page) {
    load<Config::kHeadDim>(keys_, params_.k_stride_page, params_.k_stride_token, shared.keys[key_.stage], shared.key_ring,
                           key_, step, page);
  }
  __device__ __forceinline__ void load_values(Shared& shared, int step, int page) {
    load<Config::kHeadDimVo>(values_, params_.v_stride_page, params_.v_stride_token, shared.values[value_.stage],
                             shared.value_ring, value_, step, page);
  }

  // Bytes as they are stored, to the ring where they land.
  template <class Ring, class Cursor>
  __device__ __forceinline__ void land_values(unsigned char* stage, Ring& ring, Cursor& cursor, int step, int page) {
    load<Config::kHeadDimVo>(values_, params_.v_stride_page, params_.v_stride_token, stage, ring, cursor, step, page);
  }

 private:
  __device__ __forceinline__ int position_of(int step, int round) const {
    return last_ - step * Config::kTokens + round * kRowsAtOnce + row_;
  }
  __device__ __forceinline__ bool is_readable(int position) const { return position >= lowest_ && position < kv_end_; }

  // Rows that are not readable become zeros.
  template <int kDim, int kStages>
  __device__ __forceinline__ void load(const Stored* from, int64 page_stride, int64 token_stride, unsigned char* stage,
                                       Ring<kStages>& ring, RingCursor<kStages>& cursor, int step, int page) {
    ring.acquire(cursor);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int position = position_of(step, round);
      const int its_page = kPaged ? __shfl_sync(0xffffffffu, page, round, kUnits) : 0;
      const bool readable = is_readable(position);
      const int64 token = kPaged ? position % kPageSize : table_.first_row + position;
      const Stored* row = from + (readable ? its_page * page_stride + token * token_stride : 0) + unit_ * kUnitElements;
      unsigned char* to = stage + swizzled<kBoxRowBytes>((round * kRowsAtOnce + row_) * kBoxRowBytes + unit_ * 16);
#pragma unroll
      for (int column = 0; column * Tile::kBoxElements < kDim; ++column) {
        if (column * Tile::kBoxElements + unit_ * kUnitElements < kDim) {
          copy(to + column * Tile::kKeyColumnBytes, row + column * Tile::kBoxElements, readable);
        }
      }
    }
    if constexpr (kConverted) {
      ptx::fence_proxy_async_shared();
      ptx::arrive(&ring.full[cursor.stage]);
    } else {
      ring.arrive_when_copied(cursor);
    }
    cursor.advance();
  }

  static __device__ __forceinline__ void copy(unsigned char* to, const Stored* from, bool readable) {
    if constexpr (kConverted) {
      const uint2 bytes = readable ? __ldg(reinterpret_cast<const uint2*>(from)) : uint2{};
      *reinterpret_cast<uint4*>(to) = widened<Factor, Stored>(bytes);
    } else {
      ptx::cp_async_16(to, from, readable);
    }
  }

  const Params& params_;
  const int unit_, row_;
  RequestTable<Config, Params> table_;
  const Stored *keys_ = nullptr, *values_ = nullptr;
  int kv_end_ = 0, last_ = 0, lowest_ = 0;
  RingCursor<Config::kKeyStages> key_ = RingCursor<Config::kKeyStages>::producer();
  RingCursor<Config::kValueStages> value_ = RingCursor<Config::kValueStages>::producer();
};

}  // namespace fi
