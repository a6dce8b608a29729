// Keys and values of prefill that are not multiplied as they are stored: they land in a ring as they are, and the producers'
// warpgroup makes the consumers' stages of them.
//
// FP8 products (Shah et al., "FlashAttention-3", 2024, section 3.3) want the inner dim contiguous, which that of values is not:
// ldmatrix, a byte permutation and stmatrix transpose them. Lane 4 g + t then holds tokens 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of
// 16, which are the scores that the same lane of a consumer has in its accumulators: so values keep that order of tokens, and
// weights need no exchange. Of 16 dims the even ones come first, so that neighbouring rows are stored at once.
//
// K and V of 8 bits beside Q of 16 become Q's type.
#pragma once

#include "fi/attention/prefill_boxes.cuh"
#include "fi/attention/prefill_rows.cuh"
#include "fi/ptx/ldmatrix.cuh"

namespace fi {

// Direct: what copies bytes as they are.
template <class Config, class Params, class Direct>
class LandedCopies {
  using Tile = PrefillTile<Config>;
  using Shared = PrefillShared<Config>;
  using Stored = typename Config::Stored;
  using Factor = typename Tile::Factor;
  using Cursor = RingCursor<Tile::kLandingStages>;
  static constexpr int kTokens = Config::kTokens;
  static constexpr int kUnitBytes = 16;  // of a row of what landed, and of a row of a stage
  static_assert(Tile::kFp8 || sizeof(Stored) == 1);

 public:
  static constexpr int kWarps = kWarpgroupThreads / kWarpThreads;
  static constexpr int kKeyArrivals = Tile::kFp8 ? Direct::kKeyArrivals : kWarpgroupThreads;
  static constexpr int kValueArrivals = kWarpgroupThreads;
  static constexpr int kLandingArrivals = Direct::kValueArrivals;

  __device__ __forceinline__ explicit LandedCopies(const Direct& direct)
      : direct_(direct), warp_(warp_idx()), lane_(static_cast<int>(threadIdx.x) % kWarpThreads) {}

  __device__ __forceinline__ void enter(const AttentionItem& item, const ItemSteps<Config>& steps) {
    direct_.enter(item, steps);
    kv_end_ = item.kv_end;
    last_ = steps.last;
    lowest_ = steps.lowest;
  }

  // All steps of an item. What is made of one copy is made while the next one is under way.
  __device__ __forceinline__ void load(Shared& shared, int num_steps) {
    if constexpr (Tile::kFp8) load_transposed(shared, num_steps);
    else load_widened(shared, num_steps);
  }

 private:
  __device__ __forceinline__ bool copies() const { return warp_ < Direct::kWarps; }

  __device__ __forceinline__ void load_transposed(Shared& shared, int num_steps) {
    const auto start = [&](int step, typename Direct::Place place) {
      if (!copies()) return;
      direct_.load_keys(shared, step, place);
      direct_.land_values(shared.landing[start_.stage], shared.landing_ring, start_, step, place);
    };
    if (num_steps > 0) start(0, place_of(0));
    auto place = place_of(min(1, num_steps - 1));
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) {
      const auto next = place_of(min(step + 2, num_steps - 1));
      if (step + 1 < num_steps) start(step + 1, place);
      place = next;
      shared.landing_ring.wait_full(finish_);
      shared.value_ring.acquire(value_);
      transpose(shared.landing[finish_.stage], shared.values[value_.stage], last_ - step * kTokens);
      pass_on(shared, shared.value_ring, value_);
    }
  }

  // Copies of an item in the order in which consumers take them: keys of a step, then values of the step before.
  struct Turn {
    bool keys;
    int step;
    __device__ __forceinline__ Turn(int idx, int num_steps)
        : keys(idx == 0 || (idx % 2 == 1 && idx < 2 * num_steps - 1)),
          step(idx == 0 ? 0 : keys ? (idx + 1) / 2 : idx % 2 == 1 ? num_steps - 1 : idx / 2 - 1) {}
  };

  __device__ __forceinline__ void load_widened(Shared& shared, int num_steps) {
    const auto start = [&](Turn turn, typename Direct::Place place) {
      if (!copies()) return;
      if (turn.keys) direct_.land_keys(shared.landing[start_.stage], shared.landing_ring, start_, turn.step, place);
      else direct_.land_values(shared.landing[start_.stage], shared.landing_ring, start_, turn.step, place);
    };
    const int num_turns = 2 * num_steps;
    if (num_turns == 0) return;
    start(Turn(0, num_steps), place_of(0));
    auto place = place_of(Turn(1, num_steps).step);
#pragma unroll 1
    for (int idx = 0; idx < num_turns; ++idx) {
      const auto next = place_of(Turn(min(idx + 2, num_turns - 1), num_steps).step);
      if (idx + 1 < num_turns) start(Turn(idx + 1, num_steps), place);
      place = next;
      const Turn turn(idx, num_steps);
      const int position = last_ - turn.step * kTokens;
      shared.landing_ring.wait_full(finish_);
      const unsigned char* from = shared.landing[finish_.stage];
      if (turn.keys) {
        shared.key_ring.acquire(key_);
        widen<Config::kHeadDim>(from, shared.keys[key_.stage], position);
        pass_on(shared, shared.key_ring, key_);
      } else {
        shared.value_ring.acquire(value_);
        widen<Config::kHeadDimVo>(from, shared.values[value_.stage], position);
        pass_on(shared, shared.value_ring, value_);
      }
    }
  }

  __device__ __forceinline__ auto place_of(int step) const {
    return copies() ? direct_.place_of(step) : typename Direct::Place{};
  }

  // The consumers get what the threads wrote; the place it was made of is free.
  template <class Ring, class RingCursor>
  __device__ __forceinline__ void pass_on(Shared& shared, Ring& ring, RingCursor& cursor) {
    ptx::fence_proxy_async_shared();
    ptx::arrive(&ring.full[cursor.stage]);
    cursor.advance();
    __syncwarp();
    if (lane_ == 0) shared.landing_ring.release(finish_);
    finish_.advance();
  }

  __device__ __forceinline__ bool is_readable(int position) const { return position >= lowest_ && position < kv_end_; }

  // Values [tokens, dims] at `position` to [dims, tokens]; tokens that are not readable become zeros.
  __device__ __forceinline__ void transpose(const unsigned char* from, unsigned char* to, int position) const {
    constexpr int kTokenBlocks = kTokens / 32, kUnits = kTokenBlocks * (Config::kHeadDimVo / kUnitBytes);
    static_assert(kTokens % 32 == 0);
    const bool whole = position >= lowest_ && position + kTokens <= kv_end_;
#pragma unroll 4
    for (int unit = warp_; unit < kUnits; unit += kWarps) {
      const int tokens = unit % kTokenBlocks * 32, dims = unit / kTokenBlocks * kUnitBytes;
      unsigned octets[4], rows[4];
      ptx::ldmatrix_x4_trans(octets, from + dims / kBoxRowBytes * Tile::kKeyColumnBytes +
                                         swizzled<kBoxRowBytes>((tokens + lane_) * kBoxRowBytes + dims % kBoxRowBytes));
      if (!whole) {
#pragma unroll
        for (int octet = 0; octet < 4; ++octet) {
          const int token = position + tokens + octet * 8 + lane_ % 4 * 2;
          octets[octet] &= (is_readable(token) ? 0xffffu : 0u) | (is_readable(token + 1) ? 0xffff0000u : 0u);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rows[half] = __byte_perm(octets[2 * half], octets[2 * half + 1], 0x6420);
        rows[2 + half] = __byte_perm(octets[2 * half], octets[2 * half + 1], 0x7531);
      }
      const int row = dims + lane_ / 16 * 8 + lane_ % 8;
      ptx::stmatrix_x4(to + tokens / kBoxRowBytes * Tile::kTransposedColumnBytes +
                           swizzled<kBoxRowBytes>(row * kBoxRowBytes + tokens % kBoxRowBytes + lane_ / 8 % 2 * kUnitBytes),
                       rows);
    }
  }

  // Rows of kDim bytes at `position` to rows of 16 bits an element; those that are not readable become zeros. A thread has the same
  // 8 bytes of every so many rows, a multiple of the swizzle's 8.
  template <int kDim>
  __device__ __forceinline__ void widen(const unsigned char* from, unsigned char* to, int position) const {
    constexpr int kLanes = kDim <= 64 ? 8 : kDim <= 128 ? 16 : 32;  // of a row
    constexpr int kRowsAtOnce = kWarpgroupThreads / kLanes, kRounds = kTokens / kRowsAtOnce, kBatch = 4;
    constexpr int kStride = kRowsAtOnce * kBoxRowBytes;
    // Four rows are half of the swizzle's pattern: every other round has the other half of a row's 128 bytes.
    constexpr int kPeriod = kRowsAtOnce % 8 == 0 ? 1 : 2;
    static_assert(kRounds % kBatch == 0 && kBatch % kPeriod == 0 && kRowsAtOnce % 4 == 0 && kDim <= kLanes * 8);
    const int thread = static_cast<int>(threadIdx.x), row = thread / kLanes, column = thread % kLanes * 8;
    if (column >= kDim) return;
    const int source = swizzled<kBoxRowBytes>(row * kBoxRowBytes + column % kBoxRowBytes);
    const int target = swizzled<kBoxRowBytes>(row * kBoxRowBytes + 2 * column % kBoxRowBytes);
    from += column / kBoxRowBytes * Tile::kKeyColumnBytes;
    to += 2 * column / kBoxRowBytes * Tile::kKeyColumnBytes;
    const bool whole = position >= lowest_ && position + kTokens <= kv_end_;
#pragma unroll 1
    for (int first = 0; first < kRounds; first += kBatch) {
      uint2 bytes[kBatch];  // all are under way before the first is used
#pragma unroll
      for (int idx = 0; idx < kBatch; ++idx) {
        bytes[idx] = *reinterpret_cast<const uint2*>(from + (source ^ (idx % kPeriod * 64)) + (first + idx) * kStride);
        if (!whole && !is_readable(position + row + (first + idx) * kRowsAtOnce)) bytes[idx] = uint2{};
      }
#pragma unroll
      for (int idx = 0; idx < kBatch; ++idx) {
        *reinterpret_cast<uint4*>(to + (target ^ (idx % kPeriod * 64)) + (first + idx) * kStride) = widened<Factor, Stored>(bytes[idx]);
      }
    }
  }

  Direct direct_;
  const int warp_, lane_;
  int kv_end_ = 0, last_ = 0, lowest_ = 0;
  RingCursor<Config::kKeyStages> key_ = RingCursor<Config::kKeyStages>::producer();
  RingCursor<Config::kValueStages> value_ = RingCursor<Config::kValueStages>::producer();
  Cursor start_ = Cursor::producer(), finish_ = Cursor::consumer();
};

}  // namespace fi
