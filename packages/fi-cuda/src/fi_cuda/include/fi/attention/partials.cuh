// What becomes of an item's result: the warps' shares are added up, and it goes to the output, or, if its tile was split, to a
// slot from which the tile's pieces are merged in the plan's order. Equal inputs and plan give equal bits, whoever merges.
//
// Pieces meet at a counter that needs no reset: the worker of the first piece adds 2^31 - (pieces - 1) and every other adds 1,
// so the top bit flips when all have arrived and the rest is 0 again. A tile of few pieces is merged by the block that flips
// it. A tile of many is merged in slices by those workers whose whole work was a piece of it: they wait for the flip, which
// comes because the launch is cooperative: all blocks are resident.
#pragma once

#include "fi/attention/decode_state.cuh"
#include "fi/ptx/fence.cuh"

namespace fi {

// The warps' shares of an item.
template <class Config>
struct Shares {
  static constexpr int kPitch = Config::kHeadDimVo + 4;  // lanes of one store then differ in bank
  static constexpr int kRows = WarpPlace<Config>::kTokenWarps * Config::kRows;

  float totals[kRows * kPitch];  // [token warps, rows, pitch], unnormalised
  PartialRow rows[kRows];        // [token warps, rows]
};

// Pieces from which on a tile is merged in slices, and those that a lane loads at once.
constexpr int kManyPieces = 6;
constexpr int kPiecesAtOnce = 5;

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
  // `flag` is in shared memory, like the shares.
  __device__ __forceinline__ ItemFinisher(const Params& params, Shares<Config>& shares, int* flag)
      : params_(params), shares_(shares), flag_(flag) {}

  // Called by all threads of the block for every item, with their warp's state.
  __device__ __forceinline__ void finish(const AttentionItem& item, const State& state) {
    leave_share(state);
    __syncthreads();
    add_shares(item);
    if (item.slot >= 0) merge_pieces(item);
    __syncthreads();  // the shares are free for the next item
  }

 private:
  // Adds the warps' shares up in their order, and stores the result or the piece.
  __device__ __forceinline__ void add_shares(const AttentionItem& item) const {
    for (int unit = threadIdx.x; unit < Config::kRows * kQuads; unit += kThreads) {
      const int row = unit / kQuads, quad = unit % kQuads;
      const Row where(item, row);
      if (!where.live) continue;
      PartialRow merged = shares_.rows[row];
      float total[4];
      read(total, shares_.totals + row * kPitch + quad * 4);
#pragma unroll
      for (int warp = 1; warp < WarpPlace<Config>::kTokenWarps; ++warp) {
        float other[4];
        read(other, shares_.totals + (warp * Config::kRows + row) * kPitch + quad * 4);
        merge_into(merged, total, shares_.rows[warp * Config::kRows + row], other);
      }
      if (item.slot < 0) {
        store(item, where, quad, merged, total, value_scale(item));
      } else {
        store_partial(item.slot * Config::kRows + row, quad, merged, total, value_scale(item));
      }
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
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
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

  // Four dims of a row, normalised, to its slot; a row without keys has the log-sum-exp -inf and the values 0.
  __device__ __forceinline__ void store_partial(int slot_row, int quad, PartialRow known, const float (&total)[4],
                                                float scale) const {
    const RowResult result = finish_row(known);
    float4 values;
    const float factor = result.scale * scale;
    values.x = result.scale == 0.0f ? 0.0f : total[0] * factor;
    values.y = result.scale == 0.0f ? 0.0f : total[1] * factor;
    values.z = result.scale == 0.0f ? 0.0f : total[2] * factor;
    values.w = result.scale == 0.0f ? 0.0f : total[3] * factor;
    reinterpret_cast<float4*>(params_.partials)[static_cast<int64>(slot_row) * kQuads + quad] = values;
    if (quad == 0) static_cast<float*>(params_.partial_lses)[slot_row] = result.lse * kLog2E;
  }

  __device__ __forceinline__ void merge_pieces(const AttentionItem& item) {
    const int pieces = item.num_pieces();
    // Which workers continue a tile follows from slots only where these are numbered by worker.
    const bool sliced = !Config::kBatchInvariant && pieces >= kManyPieces;
    __syncthreads();  // every thread's part of the piece is written
    if (threadIdx.x == 0) *flag_ = sliced ? arrive_and_wait(item) : arrive(item, counter_of(item)) < 0;
    __syncthreads();
    if (*flag_ == 0) return;
    const int rank = sliced ? item.slot - item.tail_begin : 0, num_mergers = sliced ? item.tail_end - 1 - item.tail_begin : 1;
    // As few lanes for four dims of a row as leave none with more pieces than are loaded at once.
    const int lanes = pieces <= kPiecesAtOnce ? 1 : pieces <= 8 * kPiecesAtOnce ? 8 : 32;
    merge_slice(item, rank, num_mergers, lanes);
  }

  __device__ __forceinline__ int* counter_of(const AttentionItem& item) const {
    return static_cast<int*>(params_.arrivals) + item.merge_idx;
  }

  // Counts the piece; the result's top bit says that it was the last.
  static __device__ __forceinline__ int arrive(const AttentionItem& item, int* counter) {
    const int amount = item.slot == item.head_slot ? static_cast<int>(0x80000000u - (item.num_pieces() - 1)) : 1;
    const int before = ptx::add_acq_rel(counter, amount);
    return before ^ static_cast<int>(static_cast<unsigned>(before) + amount);
  }

  // Counts the piece; 1 once all pieces are there and this worker has a slice to merge, 0 at once if it has none.
  __device__ __forceinline__ int arrive_and_wait(const AttentionItem& item) const {
    int* counter = counter_of(item);
    // Before this piece is counted, the top bit cannot flip.
    const int before = ptx::load_acquire(counter);
    arrive(item, counter);
    if (item.slot == item.head_slot || item.slot == item.tail_end - 1) return 0;
    while ((ptx::load_acquire(counter) ^ before) >= 0) {
    }
    return 1;
  }

  // This block's part of the tile, four dims of a row at a time: `lanes` lanes share the pieces and add them up. One piece of
  // code for any number of lanes: a kernel that runs once reads its instructions from memory too.
  __device__ __forceinline__ void merge_slice(const AttentionItem& item, int rank, int num_mergers, int lanes) const {
    const int live_rows = min(item.q_len * Config::kGroupSize - item.q_tile * Config::kRows, Config::kRows);
    const int lane = static_cast<int>(threadIdx.x) % lanes, units_at_once = kThreads / lanes;
    // All lanes stay in the loop as long as one of their warp has a unit: they exchange what they hold.
#pragma unroll 1
    for (int first = rank * units_at_once; first < live_rows * kQuads; first += num_mergers * units_at_once) {
      const int unit = first + static_cast<int>(threadIdx.x) / lanes;
      const bool live = unit < live_rows * kQuads;
      const int row = live ? unit / kQuads : 0, quad = unit % kQuads;
      PartialRow merged = empty_row();
      float total[4] = {};
#pragma unroll 1
      for (int piece = lane; piece < item.num_pieces(); piece += lanes * kPiecesAtOnce) {
        add_pieces(item, piece, lanes, row, quad, merged, total);
      }
#pragma unroll 1
      for (int distance = 1; distance < lanes; distance *= 2) add_partner(distance, merged, total);
      if (live && lane == 0) store(item, Row(item, row), quad, merged, total, 1.0f);
    }
  }

  // Pieces first, first + step, ..., kPiecesAtOnce of them, loaded together. A piece's log-sum-exp, in base 2, is the base of
  // weights that add up to 1.
  __device__ __forceinline__ void add_pieces(const AttentionItem& item, int first, int step, int row, int quad,
                                             PartialRow& merged, float (&total)[4]) const {
    float lses[kPiecesAtOnce];
    float4 quads[kPiecesAtOnce];
#pragma unroll
    for (int idx = 0; idx < kPiecesAtOnce; ++idx) {
      const int piece = first + idx * step;
      const int slot_row = item.slot_of(min(piece, item.num_pieces() - 1)) * Config::kRows + row;
      lses[idx] = __ldcg(static_cast<const float*>(params_.partial_lses) + slot_row);
      quads[idx] = __ldcg(reinterpret_cast<const float4*>(params_.partials) + static_cast<int64>(slot_row) * kQuads + quad);
      if (piece >= item.num_pieces()) lses[idx] = minus_infinity();
    }
#pragma unroll
    for (int idx = 0; idx < kPiecesAtOnce; ++idx) {
      const float values[4] = {quads[idx].x, quads[idx].y, quads[idx].z, quads[idx].w};
      merge_into(merged, total, PartialRow{lses[idx], lses[idx] == minus_infinity() ? 0.0f : 1.0f}, values);
    }
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
  int* flag_;
};

}  // namespace fi
