// What becomes of the scores of tokens that their rows do not see.
#pragma once

#include "fi/attention/prefill_tiles.cuh"
#include "fi/softmax/online.cuh"
#include "fi/softmax/score.cuh"
#include "fi/tile/fragments.cuh"

namespace fi {

// Where a thread's scores of a step stand: the tokens of its rows, and its columns. What only few steps need is computed there: kept
// from step to step it would take registers from the scores.
template <class Config>
struct ScorePlace {
  int tokens[2], column;

  __device__ __forceinline__ explicit ScorePlace(int first_token) {
    const int thread = thread_anew();
    column = thread % 4 * 2;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const Element place = wgmma_accumulator_element(thread, 2 * row);
      tokens[row] = first_token + place.row / PrefillTile<Config>::kGroup;
    }
  }
  // Beyond the thread's first column.
  static __device__ __forceinline__ constexpr int column_of(int idx) { return idx / 4 * 8 + idx % 2; }
};

template <class Config, class Params>
class PrefillMask {
  using Place = ScorePlace<Config>;
  using Rows = QueriesAsRows;
  static constexpr int kUnit = 16;  // scores of 32 columns, which are hidden together

 public:
  // -inf in the place of the scores of tokens that their rows do not see. Columns of which every row sees all are passed by, so
  // that an edge costs what lies at it.
  template <int kCount>
  static __device__ __forceinline__ void hide(const Params& params, const AttentionItem& item, const GroupRows<Config, Params>& rows,
                                              int position, float (&scores)[kCount]) {
    const Place place(rows.first);
    const auto& tokens = place.tokens;
    int low[2], high[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      low[row] = Config::kWindowed ? tokens[row] + (rows.window_low - position) : 0;
      if constexpr (Config::kLevels) low[row] = max(low[row], item.kv_first - position);
      high[row] = item.kv_end - position;
      if constexpr (Config::kCausal) high[row] = min(high[row], tokens[row] + (rows.offset + 1 - position));
      low[row] -= place.column;
      high[row] -= place.column;
    }
    if constexpr (Config::kWindowed || Config::kLevels) hide_before<0>(rows.by_all.low - position, low, scores);
    hide_after<(kCount - 1) / kUnit * kUnit>(rows.by_all.high - position, scores, [&](int idx) {
      const int row = Rows::row(idx), column = Place::column_of(idx);
      bool visible = column < high[row];
      if constexpr (Config::kMask != kNoMask) {
        if (visible && tokens[row] < item.q_len) {
          visible = mask_row(params, item, tokens[row]).visible(position + place.column + column);
        }
      }
      return visible;
    });
  }

 private:
  // From the first columns on, as long as some row does not see all of them ...
  template <int kFirst, int kCount>
  static __device__ __forceinline__ void hide_before(int all_low, const int (&low)[2], float (&scores)[kCount]) {
    if constexpr (kFirst < kCount) {
      if (kFirst * 2 >= all_low) return;
#pragma unroll
      for (int idx = kFirst; idx < kFirst + kUnit && idx < kCount; ++idx) {
        scores[idx] = fi::masked(scores[idx], Place::column_of(idx) >= low[Rows::row(idx)]);
      }
      hide_before<kFirst + kUnit>(all_low, low, scores);
    }
  }
  // ... and from the last ones back.
  template <int kFirst, int kCount, class IsVisible>
  static __device__ __forceinline__ void hide_after(int all_high, float (&scores)[kCount], IsVisible is_visible) {
    if constexpr (kFirst >= 0) {
      constexpr int kEnd = kFirst + kUnit < kCount ? kFirst + kUnit : kCount;
      if (kEnd * 2 <= all_high) return;
#pragma unroll
      for (int idx = kFirst; idx < kEnd; ++idx) scores[idx] = fi::masked(scores[idx], is_visible(idx));
      hide_after<kFirst - kUnit>(all_high, scores, is_visible);
    }
  }

  static __device__ __forceinline__ PackedMaskRow mask_row(const Params& params, const AttentionItem& item, int token) {
    const unsigned char* bits = static_cast<const unsigned char*>(params.mask_bits) +
                                static_cast<const int64*>(params.mask_indptr)[item.request];
    return packed_mask_row(bits, Config::kMask == kMaskNew, token, item.q_len, item.kv_len);
  }
};

}  // namespace fi
