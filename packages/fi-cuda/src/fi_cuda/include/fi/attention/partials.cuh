// What becomes of an item's result: the warps' shares are added up, and it goes to the output, or, if its tile was split, to a
// slot from which the tile's pieces are merged in the plan's order. Equal inputs and plan give equal bits, whoever merges.
//
// Pieces need no counter, fence or barrier: a slot's words hold a bit pattern that no result has until the piece is there, and
// who merges reads until all are and leaves the pattern again. Every word is read by one thread alone.
// The worker in which a tile begins merges it, after its last piece of it. A tile of many pieces is merged in slices by
// it and those workers whose whole work is a piece of it. Either waits only when its other work is done, for first items of
// other workers, which wait for nobody; and the launch is cooperative: all blocks are resident.
#pragma once

#include "fi/attention/decode_state.cuh"
#include "fi/ptx/relaxed.cuh"

namespace fi {

// What is known of four dims of a row over some of its keys: values are weighted by 2^(logit - base), not normalised.
struct RowPart {
  PartialRow row;
  float values[4];
};

__device__ __forceinline__ RowPart empty_part() { return {empty_row(), {}}; }

// `part` with its weights in terms of `base`, which is no lower than its own; what a part without keys holds has no effect.
__device__ __forceinline__ RowPart rebased(const RowPart& part, float base) {
  const float scale = ptx::exp2_approx(part.row.base - finite_base(base));
  RowPart result = {{base, scale == 0.0f ? 0.0f : part.row.mass * scale}, {}};
#pragma unroll
  for (int e = 0; e < 4; ++e) result.values[e] = scale == 0.0f ? 0.0f : part.values[e] * scale;
  return result;
}

// Disjoint parts together, added up in their order.
template <int kCount>
__device__ __forceinline__ RowPart sum_of(const RowPart (&parts)[kCount]) {
  float base = parts[0].row.base;
#pragma unroll
  for (int idx = 1; idx < kCount; ++idx) base = Largest()(base, parts[idx].row.base);
  RowPart sum = rebased(parts[0], base);
#pragma unroll
  for (int idx = 1; idx < kCount; ++idx) {
    const RowPart part = rebased(parts[idx], base);
    sum.row.mass += part.row.mass;
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.values[e] += part.values[e];
  }
  return sum;
}

// The warps' shares of an item of one KV head; where they merge pieces, instead their sums of them.
template <class Config>
struct Shares {
  static constexpr int kPitch = Config::kHeadDimVo + 4;  // lanes of one store then differ in bank
  static constexpr int kRows = WarpPlace<Config>::kTokenWarps * Config::kRows;
  static constexpr int kSums = WarpPlace<Config>::kHeadThreads;
  static constexpr int kSumFloats = kSums * static_cast<int>(sizeof(RowPart) / sizeof(float));
  static constexpr int kTotals = kRows * kPitch > kSumFloats ? kRows * kPitch : kSumFloats;

  alignas(16) float totals[kTotals];  // [warps, rows, pitch], unnormalised
  PartialRow rows[kRows];             // [warps, rows]

  // The sum that a warp's lane left: values first, then rows.
  __device__ __forceinline__ void put_sum(int idx, const RowPart& part) {
    reinterpret_cast<float4*>(totals)[idx] = {part.values[0], part.values[1], part.values[2], part.values[3]};
    reinterpret_cast<PartialRow*>(totals + 4 * kSums)[idx] = part.row;
  }
  __device__ __forceinline__ RowPart sum(int idx) const {
    const float4 values = reinterpret_cast<const float4*>(totals)[idx];
    return {reinterpret_cast<const PartialRow*>(totals + 4 * kSums)[idx], {values.x, values.y, values.z, values.w}};
  }
};

// Pieces from which on a tile is merged in slices, and those that a lane loads at once.
constexpr int kManyPieces = 6;
constexpr int kPiecesAtOnce = 5;

// What a slot's words hold while the piece is not there: a NaN that no arithmetic gives.
constexpr unsigned kAbsent = 0xffffffffu;

template <class Config, class Params>
class ItemFinisher {
  using State = DecodeState<Config, Params>;
  using Ops = Operands<Config>;
  using Row = TileRow<Config>;
  using Dtype = typename Config::Dtype;
  static constexpr int kQuads = Config::kHeadDimVo / 4;
  static constexpr int kPitch = Shares<Config>::kPitch;
  static constexpr int kThreads = WarpPlace<Config>::kHeadThreads;
  static constexpr int kUnitsAtOnce = WarpPlace<Config>::kHeadWarps == 1 ? 1 : 4;  // of a thread that waits for pieces

 public:
  // `shares`: those of this warp's KV head. "The block" is all threads that have it.
  __device__ __forceinline__ ItemFinisher(const Params& params, Shares<Config>& shares)
      : params_(params), shares_(shares), thread_(WarpPlace<Config>::kHeadWarps == 1 ? threadIdx.x : threadIdx.x % kThreads) {}

  // Called by all threads of the block at an item's begin: brings its slot into L2, so that who looks for the piece before it
  // is there need not wait for memory.
  __device__ __forceinline__ void prepare(const AttentionItem& item) const {
    constexpr int kUnitsOfLine = 128 / sizeof(float4);
    const int unit = static_cast<int>(thread_) * kUnitsOfLine;
    if (item.slot >= 0 && unit < num_units_of(item)) {
      ptx::prefetch_to_l2(values_at(item.slot, unit));
      ptx::prefetch_to_l2(row_at(item.slot, unit));
    }
  }

  // Called by all threads of the block for every item, with their warp's state; the block's worker has `before` items before
  // it and `after` items after it.
  __device__ __forceinline__ void finish(const AttentionItem& item, const State& state, int before, int after) {
    leave_share(state);
    WarpPlace<Config>::sync_head();
    const int num_units = num_units_of(item), pieces = item.num_pieces(), piece = item.piece();
    const bool is_last = piece == pieces - 1;
    const bool owns = piece <= before && (is_last || after == 0);
    // Of few pieces the first need not go through memory; batch-invariant ones are added up in one way alone.
    const bool at_once = owns && piece == 0 && pieces <= (Config::kBatchInvariant ? 1 : kPiecesAtOnce);
    add_shares(item, num_units, at_once);
    if (!at_once) {
      // Which workers continue a tile follows from slots only where these are numbered by worker.
      const bool sliced = !Config::kBatchInvariant && pieces >= kManyPieces;
      if (sliced ? !is_last : owns) merge_slice(item, num_units, sliced ? piece : 0, sliced ? pieces - 1 : 1);
    }
    WarpPlace<Config>::sync_head();  // the shares are free for the next item
  }

 private:
  // Four dims of a row each.
  static __device__ __forceinline__ int num_units_of(const AttentionItem& item) {
    return min(item.q_len * Config::kGroupSize - item.q_tile * Config::kRows, Config::kRows) * kQuads;
  }

  // Adds the warps' shares up in their order, a unit a thread, and stores the result or the piece;
  // `at_once`: adds the tile's other pieces, of which this one is the first.
  __device__ __forceinline__ void add_shares(const AttentionItem& item, int num_units, bool at_once) const {
#pragma unroll 1
    for (int first = static_cast<int>(thread_); first < num_units; first += kUnitsAtOnce * kThreads) {
      if constexpr (kUnitsAtOnce == 1) {
        RowPart pieces[kPiecesAtOnce] = {sum_of_shares(item, first)};
        if (!at_once) {
          leave_piece(item.slot, first, pieces[0]);
          continue;
        }
        if (item.num_pieces() > 1) {
          wait_for_pieces<1>(pieces, item, 0, 1, first);
          pieces[0] = sum_of(pieces);
        }
        store(item, first, pieces[0]);
      } else {
        add_shares_of_units(item, first, num_units, at_once);
      }
    }
  }

  // The same for units `first` + idx * kThreads, whose pieces are on their way together.
  __device__ __forceinline__ void add_shares_of_units(const AttentionItem& item, int first, int num_units, bool at_once) const {
    RowPart sums[kUnitsAtOnce];
#pragma unroll
    for (int idx = 0; idx < kUnitsAtOnce; ++idx) {
      const int unit = first + idx * kThreads;
      if (unit >= num_units) break;
      sums[idx] = sum_of_shares(item, unit);
      if (!at_once) leave_piece(item.slot, unit, sums[idx]);
    }
    if (!at_once) return;
#pragma unroll 1
    for (int piece = 1; piece < item.num_pieces(); ++piece) {
      RowPart others[kUnitsAtOnce];
      wait_for_units(others, item, piece, first, num_units);
#pragma unroll
      for (int idx = 0; idx < kUnitsAtOnce; ++idx) {
        const RowPart both[2] = {sums[idx], others[idx]};
        sums[idx] = sum_of(both);
      }
    }
#pragma unroll
    for (int idx = 0; idx < kUnitsAtOnce; ++idx) {
      if (first + idx * kThreads < num_units) store(item, first + idx * kThreads, sums[idx]);
    }
  }

  // The warps' shares of a unit, added up in their order.
  __device__ __forceinline__ RowPart sum_of_shares(const AttentionItem& item, int unit) const {
    RowPart shares[WarpPlace<Config>::kTokenWarps];
#pragma unroll
    for (int warp = 0; warp < WarpPlace<Config>::kTokenWarps; ++warp) {
      const int row = warp * Config::kRows + unit / kQuads;
      const float* totals = shares_.totals + row * kPitch + unit % kQuads * 4;
      float4 values = *reinterpret_cast<const float4*>(totals);
      if (State::doubles(item)) {
        const float4 rest = *reinterpret_cast<const float4*>(totals + State::kHalfRows * kPitch);
        values = {values.x + rest.x, values.y + rest.y, values.z + rest.z, values.w + rest.w};
      }
      shares[warp] = {shares_.rows[row], {values.x, values.y, values.z, values.w}};
    }
    return sum_of(shares);
  }

  __device__ __forceinline__ float value_scale(const AttentionItem& item) const {
    if constexpr (!Config::kVScales) return params_.v_scale;
    return params_.v_scale * static_cast<const float*>(params_.v_scales)[item.kv_head * params_.v_scale_stride];
  }

  __device__ __forceinline__ void leave_share(const State& state) {
    const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    const WarpPlace<Config> warp;
#pragma unroll
    for (int n = 0; n < State::kRowTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = warp.token_warp * Config::kRows + warp.first_row() + n * 8 + 2 * t + r;
        const PartialRow known = state.softmax.row(2 * n + r);
        if (g == 0) shares_.rows[row] = known;
#pragma unroll
        for (int tile = 0; tile < Ops::kDimTiles; ++tile) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            shares_.totals[row * kPitch + Ops::value_dim(tile, half, g)] = state.total[tile][n][2 * half + r];
          }
        }
      }
    }
  }

  // A unit to the output, sinks included.
  __device__ __forceinline__ void store(const AttentionItem& item, int unit, const RowPart& part) const {
    const Row row(item, unit / kQuads);
    float sink = minus_infinity();
    if constexpr (Config::kSinks) sink = static_cast<const float*>(params_.sinks)[row.head];
    const RowResult result = finish_row(part.row, sink);
    const float scale = result.scale * value_scale(item);
    const int64 token = item.q_begin + row.token;
    Pack<Dtype, 4 * sizeof(Dtype)> out;
#pragma unroll
    for (int e = 0; e < 4; ++e) out.data[e] = from_float<Dtype>(result.scale == 0.0f ? 0.0f : part.values[e] * scale);
    store_pack(static_cast<Dtype*>(params_.out) + token * params_.out_stride_token + row.head * params_.out_stride_head +
                   unit % kQuads * 4, out);
    if constexpr (Config::kLse) {
      if (unit % kQuads == 0) static_cast<float*>(params_.lse)[token * params_.lse_stride_token + row.head] = result.lse;
    }
  }

  // Where a slot has a unit of its piece: the values, and beside them base and mass of the row.
  __device__ __forceinline__ float4* values_at(int slot, int unit) const {
    return static_cast<float4*>(params_.partials) + (slot_of_head(slot) * (Config::kRows * kQuads) + unit);
  }
  __device__ __forceinline__ float2* row_at(int slot, int unit) const {
    return static_cast<float2*>(params_.partial_rows) + (slot_of_head(slot) * (Config::kRows * kQuads) + unit);
  }
  static __device__ __forceinline__ int slot_of_head(int slot) {
    return slot * WarpPlace<Config>::kHeadWarps + WarpPlace<Config>().head_warp;
  }

  static __device__ __forceinline__ unsigned largest_word(const RowPart& part) {
    const float* values = part.values;
    return max(max(max(__float_as_uint(values[0]), __float_as_uint(values[1])),
                   max(__float_as_uint(values[2]), __float_as_uint(values[3]))),
               max(__float_as_uint(part.row.base), __float_as_uint(part.row.mass)));
  }
  // Any other NaN as it is.
  static __device__ __forceinline__ float present(float word) { return __uint_as_float(min(__float_as_uint(word), kAbsent - 1)); }

  __device__ __forceinline__ void leave_piece(int slot, int unit, const RowPart& part) const {
    const float* values = part.values;
    ptx::store_relaxed(row_at(slot, unit), float2{present(part.row.base), present(part.row.mass)});
    ptx::store_relaxed(values_at(slot, unit),
                       float4{present(values[0]), present(values[1]), present(values[2]), present(values[3])});
  }

  // This block's part of the tile. Neighbouring lanes take neighbouring units, so that their loads share lines, at least 8
  // (4, where the other lanes and warps could not load all pieces at once) and as many as leave no merger with a second round;
  // the other lanes and all warps share the pieces.
  __device__ __forceinline__ void merge_slice(const AttentionItem& item, int num_units, int rank, int num_mergers) {
    int log_units = item.num_pieces() <= (kThreads >> 3) * kPiecesAtOnce ? 3 : 2;
    while (log_units < 5 && num_units >> log_units > num_mergers) ++log_units;
    const int units_at_once = 1 << log_units, step = kThreads >> log_units;
    const int lane = static_cast<int>(thread_ % 32), warp = static_cast<int>(thread_ / 32);
    const int in_group = lane & (units_at_once - 1), first_piece = (warp << (5 - log_units)) + (lane >> log_units);
#pragma unroll 1
    for (int first = rank << log_units; first < num_units; first += num_mergers << log_units) {
      const int unit = first + in_group;
      RowPart sum = empty_part();
#pragma unroll 1
      for (int piece = first_piece; unit < num_units && piece < item.num_pieces(); piece += step * kPiecesAtOnce) {
        RowPart parts[1 + kPiecesAtOnce] = {sum};
        wait_for_pieces<1>(parts, item, piece - step, step, unit);
        sum = sum_of(parts);
      }
      __syncwarp();  // lanes that waited longer are with the others again, or every exchange would cost a detour
      sum = sum_over_lanes(sum, units_at_once);
      WarpPlace<Config>::sync_head();  // what the sums are put over has been read
      if (lane < units_at_once) shares_.put_sum(warp * 32 + lane, sum);
      WarpPlace<Config>::sync_head();
      if (static_cast<int>(thread_) < units_at_once && unit < num_units) {
        constexpr int kWarps = kThreads / 32;
        RowPart sums[kWarps];
#pragma unroll
        for (int idx = 0; idx < kWarps; ++idx) sums[idx] = shares_.sum(idx * 32 + lane);
        store(item, unit, sum_of(sums));
      }
    }
  }

  // Puts the pieces first + idx * step of a unit into parts[idx] from kFrom on, once they are there, and leaves their slots as they
  // were; parts past the last piece are empty.
  template <int kFrom, int kCount>
  __device__ __forceinline__ void wait_for_pieces(RowPart (&parts)[kCount], const AttentionItem& item, int first, int step,
                                                  int unit) const {
    wait_for<kFrom>(
        parts, [&](int idx) { return first + idx * step < item.num_pieces(); },
        [&](int idx) { return Word{item.slot_of(first + idx * step), unit}; });
  }

  // The same of one piece, for units `first` + idx * kThreads.
  template <int kCount>
  __device__ __forceinline__ void wait_for_units(RowPart (&parts)[kCount], const AttentionItem& item, int piece, int first,
                                                 int num_units) const {
    wait_for<0>(
        parts, [&](int idx) { return first + idx * kThreads < num_units; },
        [&](int idx) { return Word{item.slot_of(piece), first + idx * kThreads}; });
  }

  // A unit of a slot.
  struct Word {
    int slot, unit;
  };

  // `is_there`: whether there is a part of that number, `word_of`: where.
  template <int kFrom, int kCount, class IsThere, class WordOf>
  __device__ __forceinline__ void wait_for(RowPart (&parts)[kCount], const IsThere& is_there, const WordOf& word_of) const {
    // Compared as a whole: a comparison for each word would wait for its load before the next load is issued.
    unsigned largest;
    do {
      largest = 0;
#pragma unroll
      for (int idx = kFrom; idx < kCount; ++idx) {
        parts[idx] = empty_part();
        if (is_there(idx)) {
          const Word word = word_of(idx);
          const float2 row = ptx::load_relaxed(row_at(word.slot, word.unit));
          const float4 values = ptx::load_relaxed(values_at(word.slot, word.unit));
          parts[idx] = {{row.x, row.y}, {values.x, values.y, values.z, values.w}};
        }
      }
#pragma unroll
      for (int idx = kFrom; idx < kCount; ++idx) largest = max(largest, largest_word(parts[idx]));
    } while (largest == kAbsent);
    const float absent = __uint_as_float(kAbsent);
#pragma unroll
    for (int idx = kFrom; idx < kCount; ++idx) {
      if (is_there(idx)) {
        const Word word = word_of(idx);
        ptx::store_relaxed(row_at(word.slot, word.unit), float2{absent, absent});
        ptx::store_relaxed(values_at(word.slot, word.unit), float4{absent, absent, absent, absent});
      }
    }
  }

  // The sum of what lanes hold that are a multiple of `stride` (a power of two) apart, the same in all of them.
  static __device__ __forceinline__ RowPart sum_over_lanes(const RowPart& part, int stride) {
    float base = part.row.base;
#pragma unroll 1
    for (int distance = stride; distance < 32; distance *= 2) base = Largest()(base, from_lane_xor(base, distance));
    RowPart sum = rebased(part, base);
#pragma unroll 1
    for (int distance = stride; distance < 32; distance *= 2) {
      sum.row.mass += from_lane_xor(sum.row.mass, distance);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.values[e] += from_lane_xor(sum.values[e], distance);
    }
    return sum;
  }

  const Params& params_;
  Shares<Config>& shares_;
  const unsigned thread_;
};

}  // namespace fi
