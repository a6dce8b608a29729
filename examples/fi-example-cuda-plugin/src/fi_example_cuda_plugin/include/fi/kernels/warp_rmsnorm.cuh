// RMSNorm of short rows (Zhang and Sennrich, 2019): a warp to a row, an element to a lane, no shared memory.
//
// Config: Dtype, kWidth (a multiple of 32), kNumThreads.
// Params: x, out [rows, kWidth] and weight [kWidth]; *_strides; num_rows, inner_size; eps, weight_bias.
#pragma once

#include "fi/ptx/dependent_launch.cuh"
#include "fi/tile/pack.cuh"
#include "fi/tile/reduce.cuh"
#include "fi/tile/rows.cuh"

namespace fi {

template <class Config, class Params>
__device__ __forceinline__ void warp_rmsnorm(const Params& params) {
  using T = typename Config::Dtype;
  constexpr int kRounds = Config::kWidth / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64 row = static_cast<int64>(blockIdx.x) * (Config::kNumThreads / 32) + threadIdx.x / 32;
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();
  if (row >= params.num_rows) return;  // the whole warp: its sum needs every lane
  const T* x = static_cast<const T*>(params.x) + row_offset(row, params.inner_size, params.x_strides);
  T* out = static_cast<T*>(params.out) + row_offset(row, params.inner_size, params.out_strides);
  const T* weight = static_cast<const T*>(params.weight);

  float held[kRounds];
  float squares = 0.0f;
#pragma unroll
  for (int idx = 0; idx < kRounds; ++idx) {
    held[idx] = to_float(x[idx * 32 + lane]);
    squares += held[idx] * held[idx];
  }
  const float scale = 1.0f / sqrtf(sum_over_lanes<32>(squares) / Config::kWidth + params.eps);
#pragma unroll
  for (int idx = 0; idx < kRounds; ++idx) {
    const float factor = to_float(weight[idx * 32 + lane]) + params.weight_bias;
    out[idx * 32 + lane] = from_float<T>(held[idx] * scale * factor);
  }
}

}  // namespace fi
