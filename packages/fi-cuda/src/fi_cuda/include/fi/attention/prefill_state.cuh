// What a consumer warpgroup of prefill holds of an item: scores of a step, the weights of the step before, the online softmax and
// the output. Thread's rows 0 and 1 are accumulator rows lane / 4 and lane / 4 + 8 of its warp.
#pragma once

#include "fi/attention/prefill_tiles.cuh"
#include "fi/ptx/fence.cuh"
#include "fi/ptx/named_barrier.cuh"
#include "fi/ptx/wgmma.cuh"
#include "fi/softmax/online.cuh"
#include "fi/softmax/score.cuh"
#include "fi/tile/fragments.cuh"
#include "fi/tile/pack.cuh"
#include "fi/tile/swizzle.cuh"

namespace fi {

// The scores of one step, by features that are there; `offset` is what ALiBi adds at the step's first column.
template <class Config>
struct PrefillScore {
  static constexpr bool kPlain = !Config::kSoftCap && !Config::kAlibi && !Config::kSignedScale;
  float unit;   // what a score of 1 is in natural units
  float inner;  // what raw products are multiplied by before the cap, or where that is not above 0
  float slope[2];

  __device__ __forceinline__ float operator()(float raw, float offset, int column, int row) const {
    float score = raw;
    if constexpr (Config::kSoftCap) score = ptx::tanh_approx(raw * inner);
    else if constexpr (Config::kSignedScale) score = raw * inner;
    if constexpr (Config::kAlibi) score = score + fmaf(slope[row], static_cast<float>(column), offset);
    return score;
  }
};

template <class Config, class Params>
class PrefillState {
 public:
  using Tile = PrefillTile<Config>;
  using Dtype = typename Config::Dtype;
  using Rows = QueriesAsRows;
  static constexpr int kTokens = Tile::kTokens;
  static constexpr float kSlack = 5.0f;

  float output[Config::kHeadDimVo / 2];
  OnlineSoftmax<2> softmax;

  __device__ __forceinline__ PrefillState() : softmax(1.0f) {}

  __device__ __forceinline__ void begin(const PrefillScore<Config>& score) {
    score_ = score;
    softmax = OnlineSoftmax<2>(score.unit);
  }

  // Starts S = Q K^T for the first kWidth keys of a stage.
  template <int kWidth>
  static __device__ __forceinline__ void multiply_keys(float (&scores)[kWidth / 2], const unsigned char* queries,
                                                       const unsigned char* keys) {
    const unsigned long long q = ptx::k_major_descriptor<kBoxRowBytes>(ptx::shared_address(queries));
    const unsigned long long k = ptx::k_major_descriptor<kBoxRowBytes>(ptx::shared_address(keys));
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Config::kHeadDim / 16; ++step) {
      const int column = step / 4, inside = step % 4 * 32;
      ptx::wgmma_ss<Dtype, kWidth>(scores, ptx::advance(q, column * Tile::kQueryColumnBytes + inside),
                                   ptx::advance(k, column * Tile::kKeyColumnBytes + inside), step > 0);
    }
    ptx::wgmma_commit();
  }

  // Starts O += P V for part kPart of kParts of the first kWidth keys of a stage; kFresh: O = P V.
  template <int kWidth, bool kFresh, int kPart = 0, int kParts = 1>
  __device__ __forceinline__ void multiply_values(const unsigned (&weights)[kWidth / 16][4], const unsigned char* values) {
    const unsigned long long v =
        ptx::mn_major_descriptor<kBoxRowBytes>(ptx::shared_address(values), Tile::kKeyColumnBytes);
    if constexpr (kPart == 0) ptx::pin_registers(output);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = kWidth / 16 * kPart / kParts; step < kWidth / 16 * (kPart + 1) / kParts; ++step) {
      ptx::wgmma_rs<Dtype, Config::kHeadDimVo, ptx::Major::kMN>(output, weights[step],
                                                                ptx::advance(v, step * 16 * kBoxRowBytes), !kFresh || step > 0);
    }
    ptx::wgmma_commit();
  }

  // Makes scores of a step's products with kWidth keys at `position`, and takes their largest into account; `rescale` is what the
  // output so far has to be multiplied by.
  template <int kWidth>
  __device__ __forceinline__ void score(float (&scores)[kWidth / 2], const Params& params, const AttentionItem& item,
                                        int first_token, int position, bool masked, float (&rescale)[2]) {
    ptx::pin_registers(scores);
    if constexpr (!PrefillScore<Config>::kPlain) {
      float offset[2] = {};
      if constexpr (Config::kAlibi) {
        const ThreadPlace place(first_token);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int distance = position + place.column - query_position(place.tokens[row], item.q_len, item.kv_len);
          offset[row] = score_.slope[row] * static_cast<float>(distance);
        }
      }
#pragma unroll
      for (int idx = 0; idx < kWidth / 2; ++idx) {
        scores[idx] = score_(scores[idx], offset[Rows::row(idx)], idx / 4 * 8 + idx % 2, Rows::row(idx));
      }
    }
    if (masked) hide(params, item, first_token, position, scores);
    float tops[2];
    softmax.template find_tops<Rows>(scores, tops);
    softmax.raise_lazily(tops, kSlack, rescale);
  }

  // Puts the weights of part kPart of kParts of a step's kWidth keys in the place of the scores.
  template <int kWidth, int kPart = 0, int kParts = 1>
  __device__ __forceinline__ void weigh(float (&scores)[kWidth / 2]) {
    constexpr int kSteps = kWidth / 16, kFirst = kSteps * kPart / kParts, kEnd = kSteps * (kPart + 1) / kParts;
    if constexpr (kFirst < kEnd) {
      float(&part)[(kEnd - kFirst) * 8] = reinterpret_cast<float(&)[(kEnd - kFirst) * 8]>(scores[kFirst * 8]);
      softmax.template weigh<Rows, Config::kPolynomials>(part);
    }
  }

  // Makes the weights the next product's operand: once the product before is complete.
  template <int kWidth, int kPart = 0, int kParts = 1>
  static __device__ __forceinline__ void pack(const float (&scores)[kWidth / 2], unsigned (&weights)[kWidth / 16][4]) {
#pragma unroll
    for (int step = kWidth / 16 * kPart / kParts; step < kWidth / 16 * (kPart + 1) / kParts; ++step) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        weights[step][part] = pair_of<Dtype>(scores[step * 8 + part * 2], scores[step * 8 + part * 2 + 1]);
      }
    }
  }

  // 0, as weights are never negative; but the compiler does not know, so what depends on it comes after the exponentials.
  __device__ __forceinline__ int zero_of_weights() const { return softmax.mass[0] < 0.0f || softmax.mass[1] < 0.0f; }

  __device__ __forceinline__ void rescale_output(const float (&rescale)[2]) {
    ptx::pin_registers(output);
    if (!__any_sync(0xffffffffu, rescale[0] != 1.0f || rescale[1] != 1.0f)) return;
#pragma unroll
    for (int idx = 0; idx < Config::kHeadDimVo / 2; ++idx) output[idx] *= rescale[Rows::row(idx)];
  }

 private:
  // The tokens of the thread's rows and its first column.
  struct ThreadPlace {
    int tokens[2], column;

    __device__ __forceinline__ explicit ThreadPlace(int first_token) {
      const int thread = thread_anew();
      column = thread % 4 * 2;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const Element place = wgmma_accumulator_element(thread, 2 * row);
        tokens[row] = first_token + place.row / Tile::kGroup;
      }
    }
  };

  // -inf in the place of the scores of tokens that their rows do not see.
  template <int kCount>
  static __device__ __forceinline__ void hide(const Params& params, const AttentionItem& item, int first_token, int position,
                                              float (&scores)[kCount]) {
    const ThreadPlace place(first_token);
    const auto& tokens = place.tokens;
    position += place.column;
    int low[2], high[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const ColumnLimits seen = GroupRows<Config, Params>::rule(params).limits(
          query_position(tokens[row], item.q_len, item.kv_len), item.kv_len);
      low[row] = seen.low - position;
      high[row] = min(seen.high, item.kv_end) - position;
    }
#pragma unroll
    for (int idx = 0; idx < kCount; ++idx) {
      const int row = Rows::row(idx), column = idx / 4 * 8 + idx % 2;
      bool visible = column < high[row];
      if constexpr (Config::kWindowed) visible = visible && column >= low[row];
      if constexpr (Config::kMask != kNoMask) {
        if (visible && tokens[row] < item.q_len) visible = mask_row(params, item, tokens[row]).visible(position + column);
      }
      scores[idx] = fi::masked(scores[idx], visible);
    }
    if constexpr (Config::kLevels) {
      const int first = item.kv_first - position;
      if (first <= -place.column) return;  // beyond it once more for a few steps costs less than a bound kept for all
#pragma unroll
      for (int idx = 0; idx < kCount; ++idx) scores[idx] = fi::masked(scores[idx], idx / 4 * 8 + idx % 2 >= first);
    }
  }

  static __device__ __forceinline__ PackedMaskRow mask_row(const Params& params, const AttentionItem& item, int token) {
    const unsigned char* bits = static_cast<const unsigned char*>(params.mask_bits) +
                                static_cast<const int64*>(params.mask_indptr)[item.request];
    return packed_mask_row(bits, Config::kMask == kMaskNew, token, item.q_len, item.kv_len);
  }

  PrefillScore<Config> score_;
};

}  // namespace fi
