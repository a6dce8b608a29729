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

// The warps' shares of an item.
template <class Config>
struct Shares {
  static constexpr int kPitch = Config::kHeadDimVo + 4;  // lanes of one store then differ in bank
  static constexpr int kRows = Config::kNumWarps * Config::kRows;

  float totals[kRows * kPitch];  // [warps, rows, pitch], unnormalised
  PartialRow rows[kRows];        // [warps, rows]
};

// Pieces from which on a tile is merged in slices, and those that a lane loads at once.
constexpr int kManyPieces = 6;
constexpr int kPiecesAtOnce = 5;

// What a slot's words hold while the piece is not there: a NaN that no arithmetic gives.
constexpr unsigned kAbsent = 0xffffffffu;

// Four dims of a row of a piece, normalised, and the row's log-sum-exp in base 2, which is the base of weights that add up to
// 1; -inf and zeros for a row without keys.
struct PieceQuad {
  float values[4];
  float lse;
};

template <class Config, class Params>
class ItemFinisher {
  using State = DecodeState<Config, Params>;
  using Ops = Operands<Config>;
  using Row = TileRow<Config>;
  using Dtype = typename Config::Dtype;
  static constexpr int kQuads = Config::kHeadDimVo / 4;
  static constexpr int kPitch = Shares<Config>::kPitch;
  static constexpr int kThreads = Config::kNumWarps * 32;

 public:
  __device__ __forceinline__ ItemFinisher(const Params& params, Shares<Config>& shares) : params_(params), shares_(shares) {}

  // Called by all threads of the block for every item, with their warp's state; the block's worker has `before` items before
  // it and `after` items after it.
  __device__ __forceinline__ void finish(const AttentionItem& item, const State& state, int before, int after) {
    leave_share(state);
    __syncthreads();
    const int pieces = item.num_pieces(), piece = item.piece();
    const bool is_last = piece == pieces - 1;
    const bool owns = piece <= before && (is_last || after == 0);
    // Of few pieces the first need not go through memory.
    const bool at_once = owns && piece == 0 && pieces <= kPiecesAtOnce;
    add_shares(item, at_once);
    if (item.slot >= 0 && !at_once) {
      // Which workers continue a tile follows from slots only where these are numbered by worker.
      const bool sliced = !Config::kBatchInvariant && pieces >= kManyPieces;
      if (sliced ? !is_last : owns) merge_slice(item, sliced ? piece : 0, sliced ? pieces - 1 : 1);
    }
    __syncthreads();  // the shares are free for the next item
  }

 private:
  // Adds the warps' shares up in their order, and stores the result or the piece; `at_once`: merges the tile's other pieces
  // into this one, which is the first.
  __device__ __forceinline__ void add_shares(const AttentionItem& item, bool at_once) const {
    for (int unit = threadIdx.x; unit < Config::kRows * kQuads; unit += kThreads) {
      const int row = unit / kQuads, quad = unit % kQuads;
      const Row where(item, row);
      if (!where.live) continue;
      PartialRow merged = shares_.rows[row];
      float total[4];
      read(total, shares_.totals + row * kPitch + quad * 4);
#pragma unroll
      for (int warp = 1; warp < Config::kNumWarps; ++warp) {
        float other[4];
        read(other, shares_.totals + (warp * Config::kRows + row) * kPitch + quad * 4);
        merge_into(merged, total, shares_.rows[warp * Config::kRows + row], other);
      }
      float scale = value_scale(item);
      if (item.slot >= 0) {
        const PieceQuad own = piece_of(merged, total, scale);
        if (!at_once) {
          leave_piece(item.slot, unit, own);
          continue;
        }
        merged = {own.lse, own.lse == minus_infinity() ? 0.0f : 1.0f};
#pragma unroll
        for (int e = 0; e < 4; ++e) total[e] = own.values[e];
        add_pieces(item, 1, 1, unit, merged, total);
        scale = 1.0f;
      }
      store(item, where, quad, merged, total, scale);
    }
  }

  static __device__ __forceinline__ void read(float (&values)[4], const float* from) {
    const float4 quad = *reinterpret_cast<const float4*>(from);
    values[0] = quad.x, values[1] = quad.y, values[2] = quad.z, values[3] = quad.w;
  }

  __device__ __forceinline__ float value_scale(const AttentionItem& item) const {
    if constexpr (!Config::kVScales) return params_.v_scale;
    return params_.v_scale * static_cast<const float*>(params_.v_scales)[item.kv_head * params_.v_scale_stride];
  }

  __device__ __forceinline__ void leave_share(const State& state) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < State::kRowTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = warp * Config::kRows + n * 8 + 2 * t + r;
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

  // Four dims of a row to the output, sinks included.
  __device__ __forceinline__ void store(const AttentionItem& item, const Row& row, int quad, PartialRow known,
                                        const float (&total)[4], float scale) const {
    float sink = minus_infinity();
    if constexpr (Config::kSinks) sink = static_cast<const float*>(params_.sinks)[row.head];
    const RowResult result = finish_row(known, sink);
    const int64 token = item.q_begin + row.token;
    Pack<Dtype, 4 * sizeof(Dtype)> out;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      out.data[e] = from_float<Dtype>(result.scale == 0.0f ? 0.0f : total[e] * (result.scale * scale));
    }
    store_pack(static_cast<Dtype*>(params_.out) + token * params_.out_stride_token + row.head * params_.out_stride_head +
                   quad * 4, out);
    if constexpr (Config::kLse) {
      if (quad == 0) static_cast<float*>(params_.lse)[token * params_.lse_stride_token + row.head] = result.lse;
    }
  }

  static __device__ __forceinline__ PieceQuad piece_of(PartialRow known, const float (&total)[4], float scale) {
    const RowResult result = finish_row(known);
    const float factor = result.scale * scale;
    PieceQuad piece;
#pragma unroll
    for (int e = 0; e < 4; ++e) piece.values[e] = result.scale == 0.0f ? 0.0f : total[e] * factor;
    piece.lse = result.lse * kLog2E;
    return piece;
  }

  // Where a slot has unit `unit` (quad + row * kQuads) of its piece.
  __device__ __forceinline__ float4* values_at(int slot, int unit) const {
    return static_cast<float4*>(params_.partials) + static_cast<int64>(slot) * (Config::kRows * kQuads) + unit;
  }
  __device__ __forceinline__ float* lse_at(int slot, int unit) const {
    return static_cast<float*>(params_.partial_lses) + static_cast<int64>(slot) * (Config::kRows * kQuads) + unit;
  }

  static __device__ __forceinline__ bool is_absent(float value) { return __float_as_uint(value) == kAbsent; }
  static __device__ __forceinline__ float present(float value) { return is_absent(value) ? __uint_as_float(kAbsent >> 1) : value; }

  __device__ __forceinline__ void leave_absent(int slot, int unit) const {
    const float absent = __uint_as_float(kAbsent);
    ptx::store_relaxed(values_at(slot, unit), float4{absent, absent, absent, absent});
    ptx::store_relaxed(lse_at(slot, unit), absent);
  }
  __device__ __forceinline__ void leave_piece(int slot, int unit, const PieceQuad& piece) const {
    const float* values = piece.values;
    ptx::store_relaxed(values_at(slot, unit), float4{present(values[0]), present(values[1]), present(values[2]), present(values[3])});
    ptx::store_relaxed(lse_at(slot, unit), present(piece.lse));
  }

  // This block's part of the tile, four dims of a row at a time. One piece of code for any number of lanes: a kernel that runs
  // once reads its instructions from memory too.
  __device__ __forceinline__ void merge_slice(const AttentionItem& item, int rank, int num_mergers) const {
    const int live_rows = min(item.q_len * Config::kGroupSize - item.q_tile * Config::kRows, Config::kRows);
    const int pieces = item.num_pieces();
    // As few lanes for a unit as leave none with more pieces than are loaded at once.
    const int log_lanes = pieces <= kPiecesAtOnce ? 0 : pieces <= 8 * kPiecesAtOnce ? 3 : 5;
    const int lanes = 1 << log_lanes, units_at_once = kThreads >> log_lanes;
    const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    // All lanes stay in the loop as long as one of their warp has a unit: they exchange what they hold.
#pragma unroll 1
    for (int first = rank * units_at_once; first < live_rows * kQuads; first += num_mergers * units_at_once) {
      const int unit = first + (static_cast<int>(threadIdx.x) >> log_lanes);
      const bool live = unit < live_rows * kQuads;
      PartialRow merged = empty_row();
      float total[4] = {};
#pragma unroll 1
      for (int piece = lane; live && piece < pieces; piece += lanes * kPiecesAtOnce) {
        add_pieces(item, piece, lanes, unit, merged, total);
      }
#pragma unroll 1
      for (int distance = 1; distance < lanes; distance *= 2) add_partner(distance, merged, total);
      if (live && lane == 0) store(item, Row(item, unit / kQuads), unit % kQuads, merged, total, 1.0f);
    }
  }

  // Pieces first, first + step, ..., kPiecesAtOnce of them, loaded together until all are there.
  __device__ __forceinline__ void add_pieces(const AttentionItem& item, int first, int step, int unit, PartialRow& merged,
                                             float (&total)[4]) const {
    float4 values[kPiecesAtOnce];
    float lses[kPiecesAtOnce];
    bool complete;
    do {
      complete = true;
#pragma unroll
      for (int idx = 0; idx < kPiecesAtOnce; ++idx) {
        const int piece = first + idx * step;
        values[idx] = float4{};
        lses[idx] = minus_infinity();
        if (piece < item.num_pieces()) {
          values[idx] = ptx::load_relaxed(values_at(item.slot_of(piece), unit));
          lses[idx] = ptx::load_relaxed(lse_at(item.slot_of(piece), unit));
        }
      }
#pragma unroll
      for (int idx = 0; idx < kPiecesAtOnce; ++idx) {
        complete &= !is_absent(lses[idx]) && !is_absent(values[idx].x) && !is_absent(values[idx].y) &&
                    !is_absent(values[idx].z) && !is_absent(values[idx].w);
      }
    } while (!complete);
    float top = minus_infinity();
#pragma unroll
    for (int idx = 0; idx < kPiecesAtOnce; ++idx) top = Largest()(top, lses[idx]);
    PartialRow row = {top, 0.0f};
    float sum[4] = {};
#pragma unroll
    for (int idx = 0; idx < kPiecesAtOnce; ++idx) {
      const float weight = ptx::exp2_approx(lses[idx] - finite_base(top));
      row.mass += weight;
      sum[0] += weight * values[idx].x, sum[1] += weight * values[idx].y;
      sum[2] += weight * values[idx].z, sum[3] += weight * values[idx].w;
      const int piece = first + idx * step;
      if (piece < item.num_pieces()) leave_absent(item.slot_of(piece), unit);
    }
    merge_into(merged, total, row, sum);
  }

  // Adds what the lane `distance` away holds; the lower lane's comes first in both, so that they end with the same bits.
  static __device__ __forceinline__ void add_partner(int distance, PartialRow& merged, float (&total)[4]) {
    PartialRow other = {from_lane_xor(merged.base, distance), from_lane_xor(merged.mass, distance)};
    float other_total[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) other_total[e] = from_lane_xor(total[e], distance);
    if ((threadIdx.x & distance) == 0) {
      merge_into(merged, total, other, other_total);
    } else {
      merge_into(other, other_total, merged, total);
      merged = other;
#pragma unroll
      for (int e = 0; e < 4; ++e) total[e] = other_total[e];
    }
  }

  const Params& params_;
  Shares<Config>& shares_;
};

}  // namespace fi
