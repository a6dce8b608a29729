// Bins of a histogram over logits.
#pragma once

#include "fi/sampling/cluster_row.cuh"

namespace fi {

// Bins for logits from `top` down to `bottom`, the first for the largest. Of equal width in the logit, the last one taking what
// lies below its own width too; of these, with `outer` of 0 or more, bin `outer` cut into as many again. Or, with a `shift` of 0
// or more, of equal width in the bits of the floats, infinities included.
struct RankScale {
  float top, bottom, per_unit;
  int shift, outer;

  __device__ __forceinline__ bool covers(float logit) const {
    return logit <= top && logit >= bottom && (outer < 0 || whole_bin(place_of(logit)) == outer);
  }
  __device__ __forceinline__ int bin(float logit) const {
    if (shift >= 0) return static_cast<int>((order_key(top) - order_key(logit)) >> shift);
    const float place = place_of(logit);
    return whole_bin(outer < 0 ? place : __fsub_rn(place, static_cast<float>(outer)) * kRankBins);
  }
  // Rounded as it stands here, wherever it is asked for: were a product contracted with a difference in one place and not in another,
  // a token would be counted in one bin and looked for in the next.
  __device__ __forceinline__ float place_of(float logit) const { return __fmul_rn(__fsub_rn(top, logit), per_unit); }
  __device__ __forceinline__ static int whole_bin(float place) { return min(__float2int_rz(place), kRankBins - 1); }
};

__device__ __forceinline__ RankScale bit_scale(float top, float bottom) {
  // The least shift that leaves no more bins than there are.
  static_assert(kRankBins == 64);
  const int shift = 26 - __clz(static_cast<int>(order_key(top) - order_key(bottom)));
  return {top, bottom, 0.0f, max(shift, 0), -1};
}

// Of a whole row: as wide as tokens have mass. Tokens without are counted, but those at -inf are not.
__device__ __forceinline__ RankScale row_scale(float largest, float smallest, bool by_count) {
  const float bottom = fmaxf(largest - kMasslessShortfall, smallest);
  const float per_unit = largest > bottom ? fminf(__fdividef(static_cast<float>(kRankBins), largest - bottom), 3.4e38f) : 0.0f;  // finite
  return {largest, by_count ? -3.402823466e38f : bottom, per_unit, -1, -1};
}

}  // namespace fi
