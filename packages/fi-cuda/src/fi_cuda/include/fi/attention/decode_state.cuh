// What a warp holds of an item: its query rows, the online softmax over the chunks it has seen, and their weighted values.
// Lane 4 g + t holds rows 8 n + 2 t and 8 n + 2 t + 1 of every row tile n.
//
// Where a tile of 8 rows has but 4 to fill, rows 4 to 7 are the same queries again, and what the rounding of the weights of rows
// 0 to 3 leaves is multiplied in their place: the error of weights of 8 bits would be as large as that of the rounded output.
#pragma once

#include "fi/attention/operands.cuh"
#include "fi/attention/rotation.cuh"
#include "fi/attention/walk.cuh"
#include "fi/softmax/columns.cuh"
#include "fi/softmax/online.cuh"
#include "fi/softmax/score.cuh"

namespace fi {

// A packed query row of an item's tile, as token and query head.
template <class Config>
struct TileRow {
  int token, head;
  bool live;

  __device__ __forceinline__ TileRow(const AttentionItem& item, int row) {
    const int packed_row = item.q_tile * Config::kRows + row;
    token = packed_row / Config::kGroupSize;
    head = item.kv_head * Config::kGroupSize + packed_row % Config::kGroupSize;
    live = token < item.q_len;
  }
};

template <class Config, class Params>
struct DecodeState {
  using Dtype = typename Config::Dtype;
  using Ops = Operands<Config>;
  using Factor = typename Ops::Factor;
  using Row = TileRow<Config>;
  using Query = typename Config::Query;
  // What rows of Q are before they are factors: FP8 fits into bfloat16, whose range their rotation does not leave.
  using Held = typename FactorOf<kIsFp8<Query>, Dtype, __nv_bfloat16>::Type;
  static constexpr int kRowTiles = WarpPlace<Config>::kWarpRows / 8;
  static constexpr int kTokenTiles = Config::kChunkTokens / 16;
  static constexpr int kScores = kRowTiles * kTokenTiles * 4;
  static constexpr int kHalfRows = Config::kRows / 2;
  static constexpr bool kMayDouble = kSame<Factor, __nv_bfloat16> && Config::kRows == 8 && Config::kGroupSize <= kHalfRows;

  int first_row;  // of this warp's rows in the tile
  int last_row;   // of the 8, the last that does not stand there again
  unsigned query[Ops::kSteps][kRowTiles][2];
  float scale[kRowTiles][2];
  float slope[kRowTiles][2];
  OnlineSoftmax<kRowTiles * 2, 8, 4> softmax;
  float total[Ops::kDimTiles][kRowTiles][4];

  __device__ __forceinline__ DecodeState() : softmax(1.0f) {}

  static __device__ __forceinline__ bool doubles(const AttentionItem& item) {
    return kMayDouble && item.q_len * Config::kGroupSize <= kHalfRows;
  }
  // The row of the tile that row `idx` of this warp's is.
  __device__ __forceinline__ Row row_at(const AttentionItem& item, int idx) const {
    return Row(item, first_row + (kMayDouble ? idx & last_row : idx));
  }

  // Loads an item's query rows, `first` the first of this warp's in the tile, which begin() then takes up: what is held of the
  // item before stays, but for its rows.
  __device__ __forceinline__ void load(const Params& params, const AttentionItem& item, int first, int lane) {
    first_row = first;
    last_row = doubles(item) ? kHalfRows - 1 : 7;
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) load_query(params, item, n, lane);
  }

  // Takes up the item whose query rows were loaded.
  __device__ __forceinline__ void begin(
      const Params& params, const AttentionItem& item, const Rotator<Config>& rotator, int lane) {
    softmax = OnlineSoftmax<kRowTiles * 2, 8, 4>(1.0f);
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      settle_query(params, item, rotator, n, lane);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Row row = row_at(item, n * 8 + lane % 4 * 2 + r);
        if constexpr (Config::kAlibi) slope[n][r] = row.live ? static_cast<const float*>(params.slopes)[row.head] : 0.0f;
      }
#pragma unroll
      for (int tile = 0; tile < Ops::kDimTiles; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) total[tile][n][e] = 0.0f;
      }
    }
  }

  // Element e of the accumulator of row tile n and token tile `tile` among a lane's scores, and the row it belongs to.
  static __device__ __forceinline__ constexpr int score_idx(int n, int tile, int e) { return (n * kTokenTiles + tile) * 4 + e; }
  struct ScoreRow {
    static __device__ __forceinline__ constexpr int row(int idx) { return idx / (4 * kTokenTiles) * 2 + idx % 2; }
  };

  // Row 8 n + g of Q.
  __device__ __forceinline__ void load_query(const Params& params, const AttentionItem& item, int n, int lane) {
    const Row row = row_at(item, n * 8 + lane / 4);
    const Query* q = static_cast<const Query*>(params.q);
    if (row.live) q += (item.q_begin + row.token) * params.q_stride_token + row.head * params.q_stride_head;
#pragma unroll
    for (int step = 0; step < Ops::kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int dim = Ops::query_dim(step, half, lane % 4);
        query[step][n][half] = row.live ? held_pair(q + dim) : 0u;
      }
    }
  }

  // Makes row 8 n + g of Q a factor; the scale of rows 8 n + 2 t and 8 n + 2 t + 1.
  __device__ __forceinline__ void settle_query(
      const Params& params, const AttentionItem& item, const Rotator<Config>& rotator, int n, int lane) {
    if constexpr (Rotations<Config>::kQueries) {
      const Row row = row_at(item, n * 8 + lane / 4);
      const Row first(item, first_row + n * 8), last(item, first_row + n * 8 + 7);
      rotator.template rotate_query<Held>(query, n, row.live ? row.token : -1, first.token, min(last.token, item.q_len - 1),
                                          item.offset());
    }
    float logit_scale = params.scale;
    if constexpr (Config::kKScales) {
      logit_scale *= static_cast<const float*>(params.k_scales)[item.kv_head * params.k_scale_stride];
    }
    if constexpr (Rotations<Config>::kHalved) logit_scale *= 2.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      scale[n][r] = logit_scale;
      if constexpr (Config::kQScales) {
        const Row scored = row_at(item, n * 8 + lane % 4 * 2 + r);
        if (scored.live) scale[n][r] *= static_cast<const float*>(params.q_scales)[scored.head * params.q_scale_stride];
      }
    }
    if constexpr (!kSame<Held, Factor>) scale_query(n, lane);
  }

  // Two neighbouring elements of Q as Held, exactly.
  static __device__ __forceinline__ unsigned held_pair(const Query* q) {
    if constexpr (!kIsFp8<Query>) {
      return *reinterpret_cast<const unsigned*>(q);
    } else {
      unsigned halves, none;
      halves_of<Query>(halves, none, *reinterpret_cast<const unsigned short*>(q));
      const float2 both = Ops::template unpacked<__half>(halves);
      return Ops::template packed<Held>(both.x, both.y);
    }
  }

  // Turns rows into float16 ones: a power of two brings the row's largest element into [1, 2), and what is then below
  // float16's range does not show in a sum that holds that element.
  __device__ __forceinline__ void scale_query(int n, int lane) {
    float largest = 0.0f;
#pragma unroll
    for (int step = 0; step < Ops::kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 both = Ops::template unpacked<Held>(query[step][n][half]);
        largest = fmaxf(largest, fmaxf(fabsf(both.x), fabsf(both.y)));
      }
    }
    largest = reduce_over_lanes<4, 1>(largest, LargestNumber());
    // Exponents of 2^-126 to 2^126, so that the power and its inverse are finite and normal; rows of zeros stay.
    const unsigned exponent = min(max(__float_as_uint(largest) >> 23, 1u), 253u);
    const float down = __uint_as_float((254u - exponent) << 23);
    const float up = __uint_as_float(exponent << 23);
#pragma unroll
    for (int step = 0; step < Ops::kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 both = Ops::template unpacked<Held>(query[step][n][half]);
        query[step][n][half] = Ops::template packed<Factor>(both.x * down, both.y * down);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) scale[n][r] *= __shfl_sync(0xffffffffu, up, (lane % 4 * 2 + r) * 4);
  }

  // Attends to a stage's tokens, the first at `position`; `masked`: not all of them are visible to all rows.
  __device__ __forceinline__ void attend(const Params& params, const AttentionItem& item, const Rotator<Config>& rotator,
                                         const unsigned char* stage, int position, bool masked, int lane) {
    float products[kRowTiles][kTokenTiles][4] = {};
    const auto multiply = [&](int tile, int step, const unsigned(&a)[4]) {
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) ptx::mma_m16n8k16<Factor>(products[n][tile], a, query[step][n]);
    };
    if constexpr (Rotations<Config>::kKeys) {
      rotator.template for_keys<kTokenTiles>(stage, multiply);
    } else {
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
        Ops::for_keys(stage, tile, lane, [&](int step, const unsigned(&a)[4]) { multiply(tile, step, a); });
      }
    }
    float scores[kScores];
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          scores[score_idx(n, tile, e)] = score(params, item, n, e, products[n][tile][e], position + 16 * tile, lane);
        }
      }
    }
    if (masked) hide(params, item, scores, position, lane);
    raise(scores);
    softmax.template weigh<ScoreRow>(scores);
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      unsigned weights[kRowTiles][2];
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int first = score_idx(n, tile, 2 * half);
          unsigned rounded = Ops::template packed<Factor>(scores[first], scores[first + 1]);
          if constexpr (kMayDouble) {
            const float2 kept = Ops::template unpacked<Factor>(rounded);
            const unsigned rest = Ops::template packed<Factor>(scores[first] - kept.x, scores[first + 1] - kept.y);
            rounded = lane % 4 * 2 > last_row ? rest : rounded;
          }
          weights[n][half] = ptx::movmatrix_trans(rounded);
        }
      }
      Ops::for_values(stage, tile, lane, [&](int dim_tile, const unsigned(&a)[4]) {
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) ptx::mma_m16n8k16<Factor>(total[dim_tile][n], a, weights[n]);
      });
    }
  }

  // Brings the rows' tops up to date. Most chunks of a long row raise none, and a vote is quicker than a reduction and a rescaling.
  __device__ __forceinline__ void raise(const float (&scores)[kScores]) {
    bool exceeded = false;
#pragma unroll
    for (int idx = 0; idx < kScores; ++idx) exceeded |= scores[idx] > softmax.top[ScoreRow::row(idx)];
    if (__any_sync(0xffffffffu, exceeded)) {
      float tops[kRowTiles * 2], rescale[kRowTiles * 2];
      softmax.template find_tops<ScoreRow>(scores, tops);
      softmax.raise(tops, rescale);
#pragma unroll
      for (int tile = 0; tile < Ops::kDimTiles; ++tile) {
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) total[tile][n][e] *= rescale[2 * n + e % 2];
        }
      }
    }
  }

  // The logit, in natural units, of accumulator element e of row tile n.
  __device__ __forceinline__ float score(
      const Params& params, const AttentionItem& item, int n, int e, float product, int position, int lane) const {
    const int r = e % 2;
    float result = product * scale[n][r];
    if constexpr (Config::kSoftCap) {
      const SoftCapScore capped(1.0f, params.soft_cap);
      result = capped(result, 0.0f) * capped.unit();
    }
    if constexpr (Config::kAlibi) {
      const Row row = row_at(item, n * 8 + lane % 4 * 2 + r);
      const int distance = position + lane / 4 + e / 2 * 8 - query_position(row.token, item.q_len, item.kv_len);
      result = fmaf(slope[n][r], static_cast<float>(distance), result);
    }
    return result;
  }

  // -inf in the place of the scores of tokens that their rows do not see.
  __device__ __forceinline__ void hide(
      const Params& params, const AttentionItem& item, float (&scores)[kScores], int position, int lane) const {
#pragma unroll
    for (int idx = 0; idx < kScores; ++idx) {
      const int in_row = ScoreRow::row(idx);
      const Row row = row_at(item, in_row / 2 * 8 + lane % 4 * 2 + in_row % 2);
      const ColumnLimits seen = rule(params).limits(query_position(row.token, item.q_len, item.kv_len), item.kv_len);
      const int key = position + idx / 4 % kTokenTiles * 16 + lane / 4 + idx % 4 / 2 * 8;
      bool visible = key >= seen.low && key < min(seen.high, item.kv_end);
      if constexpr (Config::kMask != kNoMask) {
        if (visible && row.live) visible = mask_row(params, item, row.token).visible(key);
      }
      scores[idx] = fi::masked(scores[idx], visible);
    }
  }

  // Tokens that every row of the tile sees: chunks inside need no mask.
  static __device__ __forceinline__ ColumnLimits seen_by_all(const Params& params, const AttentionItem& item) {
    const int first = Row(item, 0).token, last = min(Row(item, Config::kRows - 1).token, item.q_len - 1);
    ColumnLimits seen = rule(params).seen_by_all(query_position(first, item.q_len, item.kv_len),
                                                 query_position(last, item.q_len, item.kv_len), item.kv_len);
    seen.high = min(seen.high, item.kv_end);
    if constexpr (Config::kMask == kMaskNew) seen.high = min(seen.high, item.offset());
    if constexpr (Config::kMask == kMaskKv) seen.high = 0;
    return seen;
  }

  static __device__ __forceinline__ ColumnRule rule(const Params& params) {
    return {Config::kCausal, Config::kWindowed ? params.window : kNoWindow};
  }

  static __device__ __forceinline__ PackedMaskRow mask_row(const Params& params, const AttentionItem& item, int token) {
    const unsigned char* bits = static_cast<const unsigned char*>(params.mask_bits) +
                                static_cast<const int64*>(params.mask_indptr)[item.request];
    return packed_mask_row(bits, Config::kMask == kMaskNew, token, item.q_len, item.kv_len);
  }
};

}  // namespace fi
