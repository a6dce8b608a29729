// What a consumer warpgroup of prefill holds of an item: scores of a step, the weights of the step before, the online softmax and
// the output. Thread's rows 0 and 1 are accumulator rows lane / 4 and lane / 4 + 8 of its warp.
#pragma once

#include "fi/attention/prefill_hide.cuh"
#include "fi/ptx/convert.cuh"
#include "fi/ptx/fence.cuh"
#include "fi/ptx/named_barrier.cuh"
#include "fi/ptx/wgmma.cuh"
#include "fi/softmax/online.cuh"
#include "fi/softmax/score.cuh"
#include "fi/tile/fragments.cuh"
#include "fi/tile/pack.cuh"
#include "fi/tile/swizzle.cuh"

namespace fi {

// The scores of one step, by features that are there; of what ALiBi adds, the part that differs from column to column. Rows differ
// where each query head has a scale of its own.
template <class Config>
struct PrefillScore {
  static constexpr bool kPlain = !Config::kSoftCap && !Config::kAlibi && !Config::kSignedScale;
  static constexpr int kUnits = Config::kQScales ? 2 : 1;
  float unit[kUnits];   // what a score of 1 is in natural units
  float inner[kUnits];  // what raw products are multiplied by before the cap, or where that is not above 0
  float slope[2];

  __device__ __forceinline__ float operator()(float raw, int column, int row) const {
    float score = raw;
    if constexpr (Config::kSoftCap) score = ptx::tanh_approx(raw * inner[row % kUnits]);
    else if constexpr (Config::kSignedScale) score = raw * inner[row % kUnits];
    if constexpr (Config::kAlibi) score = fmaf(slope[row], static_cast<float>(column), score);
    return score;
  }
};

// A soft cap as part of the exponent, where no score is far from 0: cap * tanh(x) = cap * x * (first + third * x^2), and a step's
// largest score is found before it is capped, as tanh keeps the order. Within kBound the error is 2^-12.9 of the logit (the hardware's
// tanh: 2^-11); beyond it, and where scores are masked, scores are capped one by one and the exponent is theirs, with `third` 0.
struct BentLogits {
  static constexpr float kBound = 0.3f, kFirst = 0.9998702f, kThird = -0.3217133f;
  float first, third;

  // Base-2 logit of a raw product.
  __device__ __forceinline__ float operator()(float raw, float base = 0.0f) const {
    return fmaf(raw, fmaf(raw * raw, third, first), -base);
  }
};

template <class T>
constexpr bool kIsBfloat16 = false;
template <>
constexpr bool kIsBfloat16<__nv_bfloat16> = true;

template <class Config, class Params>
class PrefillState {
 public:
  using Tile = PrefillTile<Config>;
  using Factor = typename Tile::Factor;
  using Rows = QueriesAsRows;
  using Place = ScorePlace<Config>;
  static constexpr int kTokens = Tile::kTokens;
  static constexpr int kStepKeys = Tile::kStepElements;  // of a product with values
  // Weights in e4m3 are at most 448 and lose bits below 2^-6: as large as fits, 2^8 e^kSlack.
  static constexpr int kLift = Tile::kFp8 ? 8 : 0;
  static constexpr float kSlack = Tile::kFp8 ? 0.55f : 5.0f;
  // An item's first keys raise nearly every row's top, slack or not, and short rows have no others: there the base is the top, so
  // that the largest weight is exactly 1, as in other implementations.
  static constexpr int kFollowedKeys = Tile::kFp8 ? 0 : 256;
  // Beside overlapped steps the hardware's tanh costs nothing that this would save.
  static constexpr bool kBent = Config::kSoftCap && !Config::kOverlap && !Config::kAlibi && !Config::kSignedScale &&
                                PrefillScore<Config>::kUnits == 1;
  // Capped logits are at most the cap and at least -cap, so where it is small no score needs to be looked at: from a base of cap - kSpan
  // or more no weight is above e^kSpan, which leaves sums of them times values far from the end of float32 (and bfloat16), and a row's
  // largest is at least e^(kSpan - 2 kLargestCap).
  static constexpr bool kBounded = Config::kSoftCap && !kBent && !Config::kAlibi && kIsBfloat16<Factor>;
  static constexpr float kSpan = 55.0f, kLargestCap = 64.0f;

  float output[Config::kHeadDimVo / 2];
  OnlineSoftmax<2, 4, 1, PrefillScore<Config>::kUnits, kLift> softmax;

  __device__ __forceinline__ PrefillState() : softmax(1.0f) {}

  __device__ __forceinline__ void begin(const PrefillScore<Config>& score) {
    score_ = score;
    softmax.begin(score.unit);
    if constexpr (kBounded) {
      if (is_bounded()) softmax.top[0] = softmax.top[1] = 1.0f - kSpan / score.unit[0];
    }
  }

  // Starts S = Q K^T for the first kWidth keys of a stage.
  template <int kWidth>
  static __device__ __forceinline__ void multiply_keys(float (&scores)[kWidth / 2], const unsigned char* queries,
                                                       const unsigned char* keys) {
    const unsigned long long q = ptx::k_major_descriptor<kBoxRowBytes>(ptx::shared_address(queries));
    const unsigned long long k = ptx::k_major_descriptor<kBoxRowBytes>(ptx::shared_address(keys));
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Config::kHeadDim / Tile::kStepElements; ++step) {
      const int column = step / 4, inside = step % 4 * 32;
      ptx::wgmma_ss<Factor, kWidth>(scores, ptx::advance(q, column * Tile::kQueryColumnBytes + inside),
                                   ptx::advance(k, column * Tile::kKeyColumnBytes + inside), step > 0);
    }
    ptx::wgmma_commit();
  }

  // Starts O += P V for part kPart of kParts of the first kWidth keys of a stage; `fresh`: O = P V.
  template <int kWidth, int kPart = 0, int kParts = 1>
  __device__ __forceinline__ void multiply_values(const unsigned (&weights)[kWidth / kStepKeys][4], const unsigned char* values,
                                                  bool fresh) {
    constexpr int kSteps = kWidth / kStepKeys;
    const unsigned address = ptx::shared_address(values);
    const unsigned long long v = Tile::kFp8 ? ptx::k_major_descriptor<kBoxRowBytes>(address)
                                            : ptx::mn_major_descriptor<kBoxRowBytes>(address, Tile::kKeyColumnBytes);
    if constexpr (kPart == 0) ptx::pin_registers(output);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = kSteps * kPart / kParts; step < kSteps * (kPart + 1) / kParts; ++step) {
      const bool adds = !fresh || step > kSteps * kPart / kParts;
      const int place = Tile::kFp8 ? step / 4 * Tile::kTransposedColumnBytes + step % 4 * 32 : step * 16 * kBoxRowBytes;
      ptx::wgmma_rs<Factor, Config::kHeadDimVo, Tile::kFp8 ? ptx::Major::kK : ptx::Major::kMN>(
          output, weights[step], ptx::advance(v, place), adds);
    }
    ptx::wgmma_commit();
  }

  // Makes scores of a step's products with kWidth keys at `position`; `rows`: those of the warpgroup.
  template <int kWidth>
  __device__ __forceinline__ void make_scores(float (&scores)[kWidth / 2], const Params& params, const AttentionItem& item,
                                              const GroupRows<Config, Params>& rows, int position) {
    ptx::pin_registers(scores);
    if constexpr (!PrefillScore<Config>::kPlain) {
      if constexpr (Config::kAlibi) {
        const Place place(rows.first);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int distance = position + place.column - query_position(place.tokens[row], item.q_len, item.kv_len);
          shift_[row] = score_.slope[row] * static_cast<float>(distance);
        }
      }
#pragma unroll
      for (int idx = 0; idx < kWidth / 2; ++idx) {
        scores[idx] = score_(scores[idx], Place::column_of(idx), Rows::row(idx));
      }
    }
    // Not in most steps.
    if (is_masked<kWidth>(rows, position)) PrefillMask<Config, Params>::hide(params, item, rows, position, scores);
  }

  // Makes scores of a full step's products and takes the largest of the warp's into account, as make_scores and raise do; where a
  // top may have been raised, calls on_raise(rescale).
  template <class OnRaise>
  __device__ __forceinline__ void make_and_raise(float (&scores)[kTokens / 2], const Params& params, const AttentionItem& item,
                                                 const GroupRows<Config, Params>& rows, int position, int step, OnRaise on_raise) {
    float rescale[2];
    if constexpr (!kBent) {
      make_scores<kTokens>(scores, params, item, rows, position);
      if (raise(scores, step, rescale)) on_raise(rescale);
    } else {
      ptx::pin_registers(scores);
      const bool masked = is_masked<kTokens>(rows, position);
      bool far, exceeds;
      look_at(scores, far, exceeds);
      is_bent_ = true;
      if (masked || is_followed(step) || __any_sync(0xffffffffu, far || exceeds)) {
        is_bent_ = !masked && !__any_sync(0xffffffffu, far);
        if (is_bent_) {
          raise_bent(scores, slack_of(step), rescale);
          on_raise(rescale);
        } else {
          make_scores<kTokens>(scores, params, item, rows, position);
          if (raise(scores, step, rescale)) on_raise(rescale);
          straighten(scores);
        }
      }
      ptx::pin_registers(scores);  // what follows is not to be begun on either side of the branch: it would take registers
    }
  }

  // Takes the largest of the warp's scores of step `step` into account. After the first keys most steps raise no row's top: one vote
  // says so, and only where a lane objects do lanes compare what they have. Whether any may have been raised; `rescale` is what the
  // output has to be multiplied by.
  template <int kCount>
  __device__ __forceinline__ bool raise(const float (&scores)[kCount], int step, float (&rescale)[2]) {
    if (!is_followed(step)) {
      if constexpr (kBounded) {
        if (is_bounded()) return false;
      }
      rescale[0] = rescale[1] = 1.0f;
      float limits[2];
      softmax.find_limits(kSlack, limits);
      shift(limits);
      if (!__any_sync(0xffffffffu, softmax.template may_exceed<Rows>(scores, limits))) return false;
    }
    float tops[2];
    find_tops(scores, tops);
    softmax.raise_lazily(tops, slack_of(step), rescale);
    return true;
  }

  // Likewise of an item's first step.
  template <int kCount>
  __device__ __forceinline__ void raise_first(float (&scores)[kCount]) {
    float tops[2];
    find_tops(scores, tops);
#pragma unroll
    for (int row = 0; row < 2; ++row) softmax.top[row] = kBounded ? fmaxf(softmax.top[row], tops[row]) : tops[row];
    if constexpr (kBent) {
      is_bent_ = false;
      straighten(scores);
    }
  }

  // Puts the weights of part kPart of kParts of a step's kWidth keys in the place of the scores.
  template <int kWidth, int kPart = 0, int kParts = 1>
  __device__ __forceinline__ void weigh(float (&scores)[kWidth / 2]) {
    constexpr int kSteps = kWidth / kStepKeys, kFirst = kSteps * kPart / kParts, kEnd = kSteps * (kPart + 1) / kParts;
    if constexpr (kFirst < kEnd) {
      constexpr int kBegin = kFirst * kStepKeys / 2, kCount = (kEnd - kFirst) * kStepKeys / 2;
      float(&part)[kCount] = reinterpret_cast<float(&)[kCount]>(scores[kBegin]);
      float base[2];
      softmax.find_bases(base);
      shift(base);
      if constexpr (kBent) {
        const BentLogits logits = is_bent_ ? bent_logits() : BentLogits{softmax.factor[0], 0.0f};
        softmax.template weigh_by<Rows>(part, [&](float score, int row) { return logits(score, base[row]); });
      } else {
        softmax.template weigh<Rows>(part, base);
      }
    }
  }

  // Makes the weights the next product's operand: once the product before is complete. Of 8-bit ones a register takes the four
  // that a row has in two neighbouring units of 8 columns, which is the order of transposed values.
  template <int kWidth, int kPart = 0, int kParts = 1>
  static __device__ __forceinline__ void pack(const float (&scores)[kWidth / 2], unsigned (&weights)[kWidth / kStepKeys][4]) {
    constexpr int kSteps = kWidth / kStepKeys;
#pragma unroll
    for (int step = kSteps * kPart / kParts; step < kSteps * (kPart + 1) / kParts; ++step) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        if constexpr (Tile::kFp8) {
          const float* four = scores + step * 16 + part / 2 * 8 + part % 2 * 2;
          weights[step][part] = ptx::e4m3x4_of(four[0], four[1], four[4], four[5]);
        } else {
          weights[step][part] = pair_of<Factor>(scores[step * 8 + part * 2], scores[step * 8 + part * 2 + 1]);
        }
      }
    }
  }

  // 0, as weights are never negative; but the compiler does not know, so what depends on it comes after the exponentials.
  __device__ __forceinline__ int zero_of_weights() const { return softmax.mass[0] < 0.0f || softmax.mass[1] < 0.0f; }

  __device__ __forceinline__ void clear_output() {
#pragma unroll
    for (int idx = 0; idx < Config::kHeadDimVo / 2; ++idx) output[idx] = 0.0f;
  }

  __device__ __forceinline__ void rescale_output(const float (&rescale)[2]) {
#pragma unroll
    for (int idx = 0; idx < Config::kHeadDimVo / 2; ++idx) output[idx] *= rescale[Rows::row(idx)];
  }

 private:
  template <int kWidth>
  static __device__ __forceinline__ bool is_masked(const GroupRows<Config, Params>& rows, int position) {
    return position < rows.by_all.low || position + kWidth > rows.by_all.high;
  }

  // Scores are in units of the cap.
  __device__ __forceinline__ bool is_bounded() const { return score_.unit[0] <= kLargestCap; }

  static __device__ __forceinline__ bool is_followed(int step) { return step < kFollowedKeys / kTokens; }
  static __device__ __forceinline__ float slack_of(int step) { return is_followed(step) ? 0.0f : kSlack; }

  __device__ __forceinline__ BentLogits bent_logits() const {
    const float inner = score_.inner[0], first = softmax.factor[0] * inner;
    return {first * BentLogits::kFirst, first * inner * inner * BentLogits::kThird};
  }

  // Whether one of the lane's raw products is out of bounds, and whether one may be above its row's limit.
  template <int kCount>
  __device__ __forceinline__ void look_at(const float (&scores)[kCount], bool& far, bool& exceeds) const {
    float limits[2], highest[2];
    softmax.find_limits(kSlack, limits);
    softmax.template find_highest<Rows>(scores, highest);
    // Bits of floats below 0 are larger than those of others, and ordered as their magnitudes.
    unsigned lowest[4] = {};
#pragma unroll
    for (int idx = 0; idx < kCount; idx += 2) {
      unsigned& its = lowest[idx / 2 % 4];
      its = max(max(its, __float_as_uint(scores[idx])), __float_as_uint(scores[idx + 1]));
    }
    const float inner = score_.inner[0], farthest = __uint_as_float(max(max(lowest[0], lowest[1]), max(lowest[2], lowest[3])));
    const BentLogits logits = bent_logits();
    far = !(fabsf(farthest) * inner <= BentLogits::kBound);
    exceeds = false;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      far |= !(highest[row] * inner <= BentLogits::kBound);
      exceeds |= !(limits[row] > 0.0f && logits(highest[row]) <= limits[row]);
    }
  }

  // As raise, where all of the warp's raw products are within bounds.
  template <int kCount>
  __device__ __forceinline__ void raise_bent(const float (&scores)[kCount], float slack, float (&rescale)[2]) {
    const BentLogits logits = bent_logits();
    float tops[2];
    softmax.template find_own_tops<Rows>(scores, tops);
    softmax.agree_on_tops(tops);
#pragma unroll
    for (int row = 0; row < 2; ++row) tops[row] = logits(tops[row]) / softmax.factor[0];
    softmax.raise_lazily(tops, slack, rescale);
  }

  // What is masked becomes finite, as 0 times infinity is not 0.
  template <int kCount>
  __device__ __forceinline__ void straighten(float (&scores)[kCount]) {
#pragma unroll
    for (int idx = 0; idx < kCount; ++idx) scores[idx] = ptx::max_or_nan(scores[idx], -1e18f);
  }

  template <int kCount>
  __device__ __forceinline__ void find_tops(const float (&scores)[kCount], float (&tops)[2]) const {
    softmax.template find_own_tops<Rows>(scores, tops);
    if constexpr (Config::kAlibi) {
#pragma unroll
      for (int row = 0; row < 2; ++row) tops[row] += shift_[row];
    }
    softmax.agree_on_tops(tops);
  }

  // Base-2 logits of the step's scores in the place of those with all that ALiBi adds.
  __device__ __forceinline__ void shift(float (&logits)[2]) const {
    if constexpr (Config::kAlibi) {
#pragma unroll
      for (int row = 0; row < 2; ++row) logits[row] -= softmax.factor[row % PrefillScore<Config>::kUnits] * shift_[row];
    }
  }

  PrefillScore<Config> score_;
  bool is_bent_;
  float shift_[2];  // what ALiBi adds to all of a lane's scores of a step, in units of scores
};

}  // namespace fi
