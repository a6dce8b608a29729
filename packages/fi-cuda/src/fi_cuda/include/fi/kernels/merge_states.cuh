// Merges partial attention states (output, log-sum-exp) over disjoint sets of keys (Dao et al., 2022, section 3.1).
//
// A thread takes one pack of one row (token, head) and adds the states up in ascending order.
// Config: Dtype, kHeadDim, kVectorBytes, kNumThreads.
// Params: o [states, tokens, heads, kHeadDim], lse float [states, tokens, heads], o_out and lse_out without the first dim;
// *_strides (outer: token, inner: head), *_state_stride; num_rows, num_heads, num_states.
#pragma once

#include "fi/ptx/dependent_launch.cuh"
#include "fi/tile/pack.cuh"
#include "fi/tile/rows.cuh"

namespace fi {

template <class Config, class Params>
__device__ __forceinline__ void merge_states(const Params& params) {
  using T = typename Config::Dtype;
  constexpr int kCount = Config::kVectorBytes / static_cast<int>(sizeof(T));
  constexpr int kPacks = Config::kHeadDim / kCount;
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();
  const int64 place = static_cast<int64>(blockIdx.x) * Config::kNumThreads + threadIdx.x;
  const int64 row = place / kPacks;
  if (row >= params.num_rows) return;
  const int first = static_cast<int>(place % kPacks) * kCount;
  const float* lse = static_cast<const float*>(params.lse) + row_offset(row, params.num_heads, params.lse_strides);
  const T* o = static_cast<const T*>(params.o) + row_offset(row, params.num_heads, params.o_strides) + first;

  const float empty = __int_as_float(static_cast<int>(0xff800000));  // -inf
  float top = empty;
#pragma unroll 4
  for (int state = 0; state < params.num_states; ++state) top = fmaxf(top, lse[state * params.lse_state_stride]);
  const float base = top == empty ? 0.0f : top;

  float mass = 0.0f;
  float total[kCount] = {};
#pragma unroll 4
  for (int state = 0; state < params.num_states; ++state) {
    const float weight = expf(lse[state * params.lse_state_stride] - base);
    mass += weight;
    if (weight != 0.0f) {  // a state that saw no key may hold anything
      const auto values = load_pack<Config::kVectorBytes>(o + state * params.o_state_stride);
#pragma unroll
      for (int e = 0; e < kCount; ++e) total[e] += weight * to_float(values.data[e]);
    }
  }

  const float inverse = mass == 0.0f ? 0.0f : 1.0f / mass;
  Pack<T, Config::kVectorBytes> merged;
#pragma unroll
  for (int e = 0; e < kCount; ++e) merged.data[e] = from_float<T>(total[e] * inverse);
  store_pack(static_cast<T*>(params.o_out) + row_offset(row, params.num_heads, params.o_out_strides) + first, merged);
  if (first == 0) {
    float* lse_out = static_cast<float*>(params.lse_out) + row_offset(row, params.num_heads, params.lse_out_strides);
    *lse_out = base + logf(mass);  // all states empty: log(0) is -inf
  }
}

}  // namespace fi
