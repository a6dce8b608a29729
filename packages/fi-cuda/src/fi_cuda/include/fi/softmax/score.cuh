// From the raw product q . k to the score that a softmax takes: scale, soft cap, ALiBi, mask.
//
// A policy's operator() maps a raw product and the distance (key position - query position) to a score; its `unit`,
// above 0, is what a score of 1 is in natural logit units. Kept apart, the multiplication by the unit is free: the
// exponential does it (online.cuh). The order is that of fi_core's reference attention: soft cap, then ALiBi, then the
// mask.
#pragma once

#include "fi/ptx/math.cuh"
#include "fi/softmax/base2.cuh"
#include "fi/tile/reduce.cuh"

namespace fi {

// Logit scale * raw, for scale > 0.
struct PlainScore {
  float scale;

  __device__ __forceinline__ float unit() const { return scale; }
  __device__ __forceinline__ float operator()(float raw, float) const { return raw; }
};

// Logit scale * raw, for a scale of any sign: a multiplication a score.
struct ScaledScore {
  float scale;

  __device__ __forceinline__ float unit() const { return 1.0f; }
  __device__ __forceinline__ float operator()(float raw, float) const { return raw * scale; }
};

// Logit cap * tanh(scale * raw / cap), within 1e-6 * cap: two operations of the special function unit a score.
struct SoftCapScore {
  float cap;
  float doubled;  // 2 log2(e) scale / cap

  __device__ __forceinline__ SoftCapScore(float scale, float cap)
      : cap(cap), doubled(2.0f * kLog2E * scale / cap) {}
  __device__ __forceinline__ float unit() const { return cap; }
  // tanh(x) = 1 - 2 / (1 + e^(2x)); both infinities of the exponential come out as 1 and -1.
  __device__ __forceinline__ float operator()(float raw, float) const {
    return fmaf(-2.0f, ptx::rcp_approx(1.0f + ptx::exp2_approx(raw * doubled)), 1.0f);
  }
};

// The same in one operation, within 2^-11 of the logit: where exponentials, not memory, set the pace.
struct FastSoftCapScore {
  float cap;
  float inner;  // scale / cap

  __device__ __forceinline__ FastSoftCapScore(float scale, float cap) : cap(cap), inner(scale / cap) {}
  __device__ __forceinline__ float unit() const { return cap; }
  __device__ __forceinline__ float operator()(float raw, float) const { return ptx::tanh_approx(raw * inner); }
};

// Adds slope * distance (Press, Smith and Lewis, "Train short, test long", 2022) to the logit of Base. Distances are
// floats because converting an integer costs as much as an exponential; they are exact up to 2^24.
template <class Base>
struct AlibiScore {
  Base base;
  float slope;  // in units of scores

  __device__ __forceinline__ AlibiScore(Base base, float slope) : base(base), slope(slope / base.unit()) {}
  __device__ __forceinline__ float unit() const { return base.unit(); }
  __device__ __forceinline__ float operator()(float raw, float distance) const {
    return fmaf(slope, distance, base(raw, distance));
  }
};

// The score of a key that the query may not see is -inf, whatever its product was.
__device__ __forceinline__ float masked(float score, bool visible) { return visible ? score : minus_infinity(); }

}  // namespace fi
