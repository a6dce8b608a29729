// RMSNorm, alone or fused with the residual add before it (Zhang and Sennrich, 2019).
//
// kThreadsPerRow threads hold a row in registers, so it is read once and the output may be the input. kWeightsLast: weights
// are loaded behind the reduction, from L1 where other rows left them, so that their registers hold more rows in flight.
// Config: Dtype, OutDtype (Dtype or FP8), kWidth, kVectorBytes (of Dtype), kThreadsPerRow, kAdd, kNested (inner_size is not 1),
// kWeightsLast, kPastL1 (x leaves L1 to the weights), kNumThreads.
// Params: x, out [rows, kWidth] and weight [kWidth]; residual [rows, kWidth], updated in place, unused unless kAdd;
// *_strides; num_rows, inner_size; eps, weight_bias; scale (null: out_scale), what an FP8 out is divided by.
#pragma once

#include "fi/ptx/dependent_launch.cuh"
#include "fi/tile/fp8.cuh"
#include "fi/tile/pack.cuh"
#include "fi/tile/reduce.cuh"
#include "fi/tile/rows.cuh"

namespace fi {

template <class Config, class Params>
__device__ __forceinline__ void rmsnorm(const Params& params) {
  using T = typename Config::Dtype;
  using Out = typename Config::OutDtype;
  constexpr int kCount = Config::kVectorBytes / static_cast<int>(sizeof(T));
  constexpr int kPacks = Config::kWidth / kCount;
  constexpr int kPacksPerThread = (kPacks + Config::kThreadsPerRow - 1) / Config::kThreadsPerRow;
  constexpr int kRowsPerBlock = Config::kNumThreads / Config::kThreadsPerRow;
  __shared__ float scratch[Config::kNumThreads / 32];

  const int lane = static_cast<int>(threadIdx.x % Config::kThreadsPerRow);
  const int64 row = static_cast<int64>(blockIdx.x) * kRowsPerBlock + threadIdx.x / Config::kThreadsPerRow;
  const bool live = row < params.num_rows;
  const int inner_size = Config::kNested ? params.inner_size : 1;
  const T* weight = static_cast<const T*>(params.weight);
  const T* x = static_cast<const T*>(params.x) + row_offset(row, inner_size, params.x_strides);
  T* residual = static_cast<T*>(params.residual) + row_offset(row, inner_size, params.residual_strides);
  // Keeps the compiler from moving the arithmetic behind the wait.
  asm volatile("" : "+l"(x));
  if constexpr (Config::kAdd) asm volatile("" : "+l"(residual));
  if (kRowsPerBlock == 1 && !live) return;
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();

  Pack<T, Config::kVectorBytes> weights[kPacksPerThread];
  Pack<T, Config::kVectorBytes> held[kPacksPerThread];
  Pack<T, Config::kVectorBytes> added[Config::kAdd ? kPacksPerThread : 1];
#pragma unroll
  for (int idx = 0; idx < kPacksPerThread; ++idx) {
    const int pack = lane + idx * Config::kThreadsPerRow;
    if (live && pack < kPacks) {
      const T* source = x + pack * kCount;
      if constexpr (!Config::kWeightsLast) weights[idx] = load_pack<Config::kVectorBytes>(weight + pack * kCount);
      held[idx] = Config::kPastL1 ? load_pack_past_l1<Config::kVectorBytes>(source) : load_pack<Config::kVectorBytes>(source);
      if constexpr (Config::kAdd) added[idx] = load_pack<Config::kVectorBytes>(residual + pack * kCount);
    }
  }
  float out_scale = params.out_scale;
  if constexpr (kIsFp8<Out>) {
    if (params.scale != nullptr) out_scale = *static_cast<const float*>(params.scale);
  }
  float squares = 0.0f;
#pragma unroll
  for (int idx = 0; idx < kPacksPerThread; ++idx) {
    keep_whole(held[idx]);
    if constexpr (Config::kAdd) keep_whole(added[idx]);
  }
#pragma unroll
  for (int idx = 0; idx < kPacksPerThread; ++idx) {
    const int pack = lane + idx * Config::kThreadsPerRow;
    if (live && pack < kPacks) {
      float values[kCount];
      to_floats(values, held[idx]);
      if constexpr (Config::kAdd) {
        float others[kCount];
        to_floats(others, added[idx]);
#pragma unroll
        for (int e = 0; e < kCount; ++e) values[e] += others[e];
        held[idx] = rounded_pack<T>(values);
        to_floats(values, held[idx]);
        store_whole(residual + pack * kCount, held[idx]);
      }
#pragma unroll
      for (int e = 0; e < kCount; ++e) squares += values[e] * values[e];
    }
  }
  const float mean = sum_over_threads<Config::kThreadsPerRow>(squares, scratch) * (1.0f / Config::kWidth);
  const float scale = rsqrtf(mean + params.eps);

  const Divisor divisor = divisor_of(out_scale);
  Out* out = static_cast<Out*>(params.out) + row_offset(row, inner_size, params.out_strides);
#pragma unroll
  for (int idx = 0; idx < kPacksPerThread; ++idx) {
    const int pack = lane + idx * Config::kThreadsPerRow;
    if (live && pack < kPacks) {
      if constexpr (Config::kWeightsLast) weights[idx] = load_pack<Config::kVectorBytes>(weight + pack * kCount);
      Pack<float, kCount * 4> normalised;
      float values[kCount], factors[kCount];
      to_floats(values, held[idx]);
      to_floats(factors, weights[idx]);
#pragma unroll
      for (int e = 0; e < kCount; ++e) normalised.data[e] = values[e] * scale * (factors[e] + params.weight_bias);
      if constexpr (kIsFp8<Out>) {
        store_pack(out + pack * kCount, quantise<Out, false>(normalised, divisor));
      } else {
        store_whole(out + pack * kCount, rounded_pack<Out>(normalised.data));
      }
    }
  }
}

}  // namespace fi
