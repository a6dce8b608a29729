// Merges partial attention states (output, log-sum-exp) over disjoint sets of keys (Dao et al., 2022, section 3.1).
//
// A thread takes one pack of one row (token, head) and adds the states up in ascending order, a few of them loaded at once.
// Config: Dtype, kHeadDim, kVectorBytes, kNumThreads.
// Params: o [states, tokens, heads, kHeadDim], lse float [states, tokens, heads], o_out and lse_out without the first dim;
// *_strides (outer: token, inner: head), *_state_stride; num_rows, num_heads, num_states.
#pragma once

#include "fi/ptx/dependent_launch.cuh"
#include "fi/tile/pack.cuh"
#include "fi/tile/rows.cuh"

namespace fi {

// -inf, the log-sum-exp of a state that saw no key.
__device__ __forceinline__ float empty_state() { return __int_as_float(static_cast<int>(0xff800000)); }

// kStates states; those past the last one are empty.
template <int kStates, int kBytes, class T>
struct LoadedStates {
  float lse[kStates];
  Pack<T, kBytes> o[kStates];

  // Moves both pointers on to the state after. The outputs do not wait for the log-sum-exps, so those of empty states are read
  // too.
  __device__ __forceinline__ void load(
      const float*& next_lse, int64 lse_stride, const T*& next_o, int64 o_stride, int num_left) {
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      lse[s] = s < num_left ? *next_lse : empty_state();
      if (s < num_left) o[s] = load_pack<kBytes>(next_o);
      next_lse += lse_stride;
      next_o += o_stride;
    }
#pragma unroll
    for (int s = 0; s < kStates; ++s) keep_whole(o[s]);
  }
};

template <class Config, class Params>
__device__ __forceinline__ void merge_states(const Params& params) {
  using T = typename Config::Dtype;
  constexpr int kStates = 4;
  constexpr int kCount = Config::kVectorBytes / static_cast<int>(sizeof(T));
  constexpr int kPacks = Config::kHeadDim / kCount;
  const int64 place = static_cast<int64>(blockIdx.x) * Config::kNumThreads + threadIdx.x;
  const int64 row = place / kPacks;
  const int first = static_cast<int>(place % kPacks) * kCount;
  const int64 token = row / params.num_heads;
  const int head = static_cast<int>(row - token * params.num_heads);
  const auto offset = [&](RowStrides strides) { return token * strides.outer + head * strides.inner; };
  int64 o_from = offset(params.o_strides) + first;
  int64 o_to = offset(params.o_out_strides) + first;
  int64 lse_from = offset(params.lse_strides);
  int64 lse_to = offset(params.lse_out_strides);
  // Keeps the compiler from moving the arithmetic, divisions above all, behind the wait.
  asm volatile("" : "+l"(o_from), "+l"(o_to), "+l"(lse_from), "+l"(lse_to));
  if (row >= params.num_rows) return;
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();

  const T* o = static_cast<const T*>(params.o) + o_from;
  const float* lse = static_cast<const float*>(params.lse) + lse_from;
  float base = 0.0f;
  float mass = 0.0f;
  float total[kCount] = {};
#pragma unroll 1
  for (int begin = 0; begin < params.num_states; begin += kStates) {
    LoadedStates<kStates, Config::kVectorBytes, T> loaded;
    loaded.load(lse, params.lse_state_stride, o, params.o_state_stride, params.num_states - begin);
    if (begin == 0) {
      float top = empty_state();
#pragma unroll
      for (int s = 0; s < kStates; ++s) top = fmaxf(top, loaded.lse[s]);
#pragma unroll 4
      for (int s = 0; s < params.num_states - kStates; ++s) top = fmaxf(top, lse[s * params.lse_state_stride]);
      base = top == empty_state() ? 0.0f : top;
    }
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      const float weight = expf(loaded.lse[s] - base);
      mass += weight;
      if (weight != 0.0f) {  // a state that saw no key may hold anything
        float values[kCount];
        to_floats(values, loaded.o[s]);
#pragma unroll
        for (int e = 0; e < kCount; ++e) total[e] += weight * values[e];
      }
    }
  }

  const float inverse = mass == 0.0f ? 0.0f : __frcp_rn(mass);
#pragma unroll
  for (int e = 0; e < kCount; ++e) total[e] *= inverse;
  store_whole(static_cast<T*>(params.o_out) + o_to, rounded_pack<T>(total));
  if (first == 0) static_cast<float*>(params.lse_out)[lse_to] = base + logf(mass);  // all states empty: log(0) is -inf
}

}  // namespace fi
