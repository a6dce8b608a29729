// Gated activations: out = act(gate) * up over rows [gate | up] (Shazeer, 2020).
//
// A block takes a piece of one row, a thread one pack of it.
// Config: Dtype, kWidth, kVectorBytes, kActivation, kNumThreads.
// Params: x [rows, 2 * kWidth], out [rows, kWidth]; *_strides; inner_size.
#pragma once

#include "fi/ptx/dependent_launch.cuh"
#include "fi/ptx/math.cuh"
#include "fi/tile/pack.cuh"
#include "fi/tile/rows.cuh"

namespace fi {

enum Activation { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

// x / (1 + 2^exponent), within 4 ulp for exponents near 0; 0 for finite x where the divisor overflows, which is the limit.
__device__ __forceinline__ float gated(float x, float exponent) {
  return x * ptx::rcp_approx(1.0f + ptx::exp2_approx(exponent));
}

template <int kActivation>
__device__ __forceinline__ float activate(float x) {
  if constexpr (kActivation == kSilu) {
    return gated(x, -1.4426950408889634f * x);
  } else if constexpr (kActivation == kGelu) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  } else {
    // 0.5 x (1 + tanh(z)) = x / (1 + e^-2z), z = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks and Gimpel, 2016)
    constexpr float kLinear = -2.3022081981443251f;  // -2 log2(e) sqrt(2 / pi)
    constexpr float kCubic = -0.10294323958002350f;  // 0.044715 of that
    return gated(x, x * __fmaf_rn(x * x, kCubic, kLinear));
  }
}

template <class Config, class Params>
__device__ __forceinline__ void gated_activation(const Params& params) {
  using T = typename Config::Dtype;
  constexpr int kCount = Config::kVectorBytes / static_cast<int>(sizeof(T));
  constexpr int kPacks = Config::kWidth / kCount;
  constexpr unsigned kBlocksPerRow = (kPacks + Config::kNumThreads - 1) / Config::kNumThreads;
  const int64 row = blockIdx.x / kBlocksPerRow;
  const int pack = static_cast<int>(blockIdx.x % kBlocksPerRow) * Config::kNumThreads + static_cast<int>(threadIdx.x);
  if (pack >= kPacks) return;
  int64 source = row_offset(row, params.inner_size, params.x_strides) + pack * kCount;
  int64 target = row_offset(row, params.inner_size, params.out_strides) + pack * kCount;
  // Keeps the compiler from moving the arithmetic behind the wait.
  asm volatile("" : "+l"(source), "+l"(target));
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();
  const T* gate = static_cast<const T*>(params.x) + source;
  const auto gates = load_pack<Config::kVectorBytes>(gate);
  const auto ups = load_pack<Config::kVectorBytes>(gate + Config::kWidth);
  float values[kCount], factors[kCount];
  to_floats(values, gates);
  to_floats(factors, ups);
#pragma unroll
  for (int e = 0; e < kCount; ++e) values[e] = activate<Config::kActivation>(values[e]) * factors[e];
  store_whole(static_cast<T*>(params.out) + target, rounded_pack<T>(values));
}

}  // namespace fi
