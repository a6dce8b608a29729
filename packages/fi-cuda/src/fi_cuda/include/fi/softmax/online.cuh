// Online softmax: a running maximum and sum for each row of scores, tile after tile (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018), in base 2 as far as the log-sum-exp.
//
// Scores are in units that a positive factor turns into base-2 logits, so that an exponential costs one multiply-add
// and one exp2. Masked scores are -inf; rows that see no key keep the sum 0. NaN reaches the result.
#pragma once

#include "fi/ptx/math.cuh"
#include "fi/softmax/base2.cuh"
#include "fi/tile/reduce.cuh"

namespace fi {

// The thread's row that element idx of its scores belongs to, if scores are accumulators of mma or wgmma: two rows,
// pairs of columns. A row lies in 4 consecutive lanes.
struct QueriesAsRows {
  FI_HOST_DEVICE static constexpr int row(int idx) { return idx / 2 % 2; }
};

// The same accumulators where a row of the matrix is a key and a column is a query, a "row" here: it lies in 8 lanes
// that are 4 apart.
struct QueriesAsColumns {
  FI_HOST_DEVICE static constexpr int row(int idx) { return idx / 4 * 2 + idx % 2; }
};

// What is known of a row over some of its keys, beside its unnormalised output: every weight is 2^(logit - base), so
// `mass` is their sum. No key yet: base -inf, mass 0.
struct PartialRow {
  float base;
  float mass;
};

__device__ __forceinline__ PartialRow empty_row() { return {minus_infinity(), 0.0f}; }

// What stands in for a base in exponents: with 0 for -inf, a score of -inf has weight 0 rather than NaN.
__device__ __forceinline__ float finite_base(float base) { return base == minus_infinity() ? 0.0f : base; }

// What makes a row's result of its unnormalised output: output * scale, and the natural-log sum of exponentials.
struct RowResult {
  float scale;
  float lse;
};

// A row without keys gives scale 0 and lse -inf. `sink` is a further logit, in natural units, that takes part in the
// sum and has no value (-inf: none).
__device__ __forceinline__ RowResult finish_row(PartialRow row, float sink = minus_infinity()) {
  const float sink_base = sink * kLog2E;
  // fmaxf would lose a NaN.
  const float base = finite_base(Largest()(row.base, sink_base));
  const float kept = ptx::exp2_approx(row.base - base);
  const float total = row.mass * kept + ptx::exp2_approx(sink_base - base);
  return {total == 0.0f ? 0.0f : kept * ptx::rcp_approx(total), (base + log2f(total)) * kLn2};
}

// What two disjoint sets of keys together know of a row; adding states up in ascending order gives the same bits each
// time. Their outputs become first * scale_first + second * scale_second.
struct MergedRow {
  PartialRow row;
  float scale_first, scale_second;
};

__device__ __forceinline__ MergedRow merge_rows(PartialRow first, PartialRow second) {
  const float base = Largest()(first.base, second.base);
  const float scale_first = ptx::exp2_approx(first.base - finite_base(base));
  const float scale_second = ptx::exp2_approx(second.base - finite_base(base));
  return {{base, first.mass * scale_first + second.mass * scale_second}, scale_first, scale_second};
}

// Adds `second` with its unnormalised output to `first` and its own. What an output without keys holds has no effect.
template <int kCount>
__device__ __forceinline__ void merge_into(
    PartialRow& first, float (&first_output)[kCount], PartialRow second, const float (&second_output)[kCount]) {
  const MergedRow merged = merge_rows(first, second);
#pragma unroll
  for (int idx = 0; idx < kCount; ++idx) {
    const float kept = merged.scale_first == 0.0f ? 0.0f : first_output[idx] * merged.scale_first;
    first_output[idx] = merged.scale_second == 0.0f ? kept : kept + second_output[idx] * merged.scale_second;
  }
  first = merged.row;
}

// The rows of one thread. Each row's scores lie in kLanes lanes, kLaneStride apart, that call everything together; they
// agree on its maximum, and each keeps the sum of its own weights until `row` adds them up. kUnits: of the rows' scores, one
// for all or one each. Weights are 2^kLift times as large as they would be, for types that keep few small numbers.
template <int kRows, int kLanes = 4, int kLaneStride = 1, int kUnits = 1, int kLift = 0>
struct OnlineSoftmax {
  static_assert(kUnits == 1 || kUnits == kRows);
  float top[kRows];   // largest score so far
  float mass[kRows];  // this lane's weights
  float factor[kUnits];

  // `unit` above 0: what a score of 1 is in natural units (score.cuh).
  __device__ __forceinline__ explicit OnlineSoftmax(float unit) {
    const float units[1] = {unit};
    begin(units);
  }
  template <int kGiven>
  __device__ __forceinline__ void begin(const float (&units)[kGiven]) {
#pragma unroll
    for (int idx = 0; idx < kUnits; ++idx) factor[idx] = units[idx % kGiven] * kLog2E;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      top[row] = minus_infinity();
      mass[row] = 0.0f;
    }
  }

  // The largest of a tile's scores in each row, over the row's lanes. Warps that share rows exchange them before
  // `raise`.
  template <class Map, int kCount>
  __device__ __forceinline__ void find_tops(const float (&scores)[kCount], float (&tops)[kRows]) const {
    find_own_tops<Map>(scores, tops);
    agree_on_tops(tops);
  }
  // The same in two halves: of the lane's own scores, then over the row's lanes.
  template <class Map, int kCount>
  __device__ __forceinline__ void find_own_tops(const float (&scores)[kCount], float (&tops)[kRows]) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) tops[row] = minus_infinity();
#pragma unroll
    for (int idx = 0; idx < kCount; ++idx) tops[Map::row(idx)] = fmaxf(tops[Map::row(idx)], scores[idx]);
  }
  __device__ __forceinline__ void agree_on_tops(float (&tops)[kRows]) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      tops[row] = reduce_over_lanes<kLanes, kLaneStride>(tops[row], LargestNumber());
    }
  }

  // Takes a tile's largest scores into account; `rescale` is what the row's output so far has to be multiplied by.
  __device__ __forceinline__ void raise(const float (&tops)[kRows], float (&rescale)[kRows]) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float before = top[row] * factor[row % kUnits];
      top[row] = fmaxf(top[row], tops[row]);
      rescale[row] = ptx::exp2_approx(before - finite_base(top[row] * factor[row % kUnits]));
      mass[row] *= rescale[row];
    }
  }

  // The same, but a row's top stays as it is while no score exceeds it by more than `slack` natural units: weights of up to
  // e^slack cost nothing, and most rescalings are saved ("FlashAttention-4", 2025).
  __device__ __forceinline__ void raise_lazily(const float (&tops)[kRows], float slack, float (&rescale)[kRows]) {
    float needed[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float its = factor[row % kUnits];
      const bool exceeds = fmaf(tops[row], its, -slack * kLog2E) > top[row] * its;
      needed[row] = exceeds ? tops[row] : minus_infinity();
    }
    raise(needed, rescale);
  }

  // Base-2 logits up to which raise_lazily changes nothing.
  __device__ __forceinline__ void find_limits(float slack, float (&limits)[kRows]) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) limits[row] = fmaf(top[row], factor[row % kUnits], slack * kLog2E);
  }
  // The largest of the lane's scores in each row, or 0 where none is above 0. Bits of floats above 0 are ordered as they are, and of
  // integers three are compared at once.
  template <class Map, int kCount>
  __device__ __forceinline__ void find_highest(const float (&scores)[kCount], float (&highest)[kRows]) const {
    constexpr int kChains = 2;  // of a row, side by side, so that none is long
    int tops[kChains][kRows] = {}, held[kRows] = {}, seen[kRows] = {};
#pragma unroll
    for (int idx = 0; idx < kCount; ++idx) {
      const int row = Map::row(idx), bits = __float_as_int(scores[idx]), turn = seen[row]++;
      int& its = tops[turn / 2 % kChains][row];
      if (turn % 2 == 0) held[row] = bits;
      else its = max(max(its, held[row]), bits);
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) highest[row] = __int_as_float(max(tops[0][row], tops[1][row]));
  }
  // Whether one of the lane's scores may be above its row's limit; where a limit is not above 0, it always may.
  template <class Map, int kCount>
  __device__ __forceinline__ bool may_exceed(const float (&scores)[kCount], const float (&limits)[kRows]) const {
    float highest[kRows];
    find_highest<Map>(scores, highest);
    bool any = false;
#pragma unroll
    for (int row = 0; row < kRows; ++row) any |= !(limits[row] > 0.0f && highest[row] * factor[row % kUnits] <= limits[row]);
    return any;
  }

  // Puts the weights 2^(factor * (score - top)) in the place of a tile's scores, none above top, and sums them up.
  template <class Map, int kCount>
  __device__ __forceinline__ void weigh(float (&scores)[kCount]) {
    float base[kRows];
    find_bases(base);
    weigh<Map>(scores, base);
  }
  // The same for other bases than those of the tops, in base-2 logits.
  __device__ __forceinline__ void find_bases(float (&base)[kRows]) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) base[row] = finite_base(top[row] * factor[row % kUnits]) - kLift;
  }
  template <class Map, int kCount>
  __device__ __forceinline__ void weigh(float (&scores)[kCount], const float (&base)[kRows]) {
    weigh_by<Map>(scores, [&](float score, int row) { return fmaf(score, factor[row % kUnits], -base[row]); });
  }
  // The same for exponents that `exponent(score, row)` gives.
  template <class Map, int kCount, class Exponent>
  __device__ __forceinline__ void weigh_by(float (&scores)[kCount], Exponent exponent) {
#pragma unroll
    for (int idx = 0; idx < kCount; ++idx) {
      scores[idx] = ptx::exp2_approx(exponent(scores[idx], Map::row(idx)));
      mass[Map::row(idx)] += scores[idx];
    }
  }

  // All three, for rows that lie in one warp.
  template <class Map, int kCount>
  __device__ __forceinline__ void step(float (&scores)[kCount], float (&rescale)[kRows]) {
    float tops[kRows];
    find_tops<Map>(scores, tops);
    raise(tops, rescale);
    weigh<Map>(scores);
  }

  // The row over the keys so far, the same in all its lanes.
  __device__ __forceinline__ PartialRow row(int idx) const {
    return {top[idx] * factor[idx % kUnits] - kLift, reduce_over_lanes<kLanes, kLaneStride>(mass[idx], Sum())};
  }
};

}  // namespace fi
