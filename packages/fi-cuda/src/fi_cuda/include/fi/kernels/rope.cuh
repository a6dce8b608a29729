// RoPE of q and k in one launch, in place or out of place.
//
// A block takes kTokensPerBlock tokens; a thread keeps one unit's cosines and sines and walks over the heads of its token.
// kHeadsFirst: its first head of q and of k is loaded before the angles, so that one does not wait for the other.
// What no table gives is computed once a token: each pair by one thread, for all through shared memory.
// Config: Dtype, PositionType, kHeadDim, kRotaryDim, kVectorBytes, kPairs, kTable, kTokensPerBlock, kHeadLanes, kHeadsFirst,
// kNumThreads.
// Params: q, k, positions, table (cos_sin or inv_freq), q_out, k_out; *_strides (outer: token, inner: head); num_tokens;
// num_q_heads, num_k_heads; table_stride; factor.
#pragma once

#include "fi/ptx/dependent_launch.cuh"
#include "fi/rope/rotate.cuh"
#include "fi/tile/pack.cuh"
#include "fi/tile/rows.cuh"

namespace fi {

// A unit of pairs of one head, between the load and the store.
template <class Config, class T>
struct HeadUnit {
  static constexpr int kBytes = Config::kVectorBytes;
  static constexpr int kCount = kBytes / static_cast<int>(sizeof(T));
  static constexpr int kSecond = Config::kPairs == kHalf ? Config::kRotaryDim / 2 : kCount;
  Pack<T, kBytes> first;
  Pack<T, kBytes> second;

  // Dims before it in its head.
  static __device__ __forceinline__ int dim(int unit) { return unit * kCount * (Config::kPairs == kHalf ? 1 : 2); }

  __device__ __forceinline__ void load(const T* source) {
    first = load_pack<kBytes>(source);
    second = load_pack<kBytes>(source + kSecond);
  }
  __device__ __forceinline__ void store(T* target, const Rotation<kCount>& rotation) {
    rotate<Config::kPairs>(first, second, rotation);
    store_pack(target, first);
    store_pack(target + kSecond, second);
  }
};

// A thread's share of one token's heads from first_head on: `unit` below kRotated rotates, others copy a pack of the dims
// behind them.
template <class Config, class T>
__device__ __forceinline__ void rope_heads(
    const T* source, T* target, int64 source_stride, int64 target_stride, int first_head, int num_heads, int unit,
    const Rotation<HeadUnit<Config, T>::kCount>& rotation) {
  using Unit = HeadUnit<Config, T>;
  constexpr int kBytes = Unit::kBytes;
  constexpr int kRotated = Config::kRotaryDim / 2 / Unit::kCount;
  if (unit >= kRotated) {
    if (source == target) return;
    const int dim = Config::kRotaryDim + (unit - kRotated) * Unit::kCount;
    for (int head = first_head; head < num_heads; head += Config::kHeadLanes) {
      store_pack(target + head * target_stride + dim, load_pack<kBytes>(source + head * source_stride + dim));
    }
    return;
  }
  constexpr int kUnroll = Config::kHeadsFirst ? 1 : 4;
#pragma unroll kUnroll
  for (int head = first_head; head < num_heads; head += Config::kHeadLanes) {
    Unit held;
    held.load(source + head * source_stride + Unit::dim(unit));
    held.store(target + head * target_stride + Unit::dim(unit), rotation);
  }
}

template <class Config, class Params>
__device__ __forceinline__ void rope(const Params& params) {
  using T = typename Config::Dtype;
  constexpr int kCount = Config::kVectorBytes / static_cast<int>(sizeof(T));
  constexpr int kNumPairs = Config::kRotaryDim / 2;
  constexpr int kUnits = kNumPairs / kCount + (Config::kHeadDim - Config::kRotaryDim) / kCount;
  constexpr int kThreadsPerToken = kUnits * Config::kHeadLanes;
  const int place = static_cast<int>(threadIdx.x) / kThreadsPerToken;
  const int64 token = static_cast<int64>(blockIdx.x) * Config::kTokensPerBlock + place;
  const int unit = static_cast<int>(threadIdx.x) % kUnits;
  const int lane = static_cast<int>(threadIdx.x) % kThreadsPerToken;
  int first_head = lane / kUnits;
  const bool live = place < Config::kTokensPerBlock && token < params.num_tokens;
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();

  const T* q = static_cast<const T*>(params.q) + token * params.q_strides.outer;
  const T* k = static_cast<const T*>(params.k) + token * params.k_strides.outer;
  const bool q_first = Config::kHeadsFirst && live && unit < kNumPairs / kCount && first_head < params.num_q_heads;
  const bool k_first = Config::kHeadsFirst && live && unit < kNumPairs / kCount && first_head < params.num_k_heads;
  HeadUnit<Config, T> q_held, k_held;
  if (q_first) q_held.load(q + first_head * params.q_strides.inner + q_held.dim(unit));
  if (k_first) k_held.load(k + first_head * params.k_strides.inner + k_held.dim(unit));

  Rotation<kCount> rotation = {};
  const auto* positions = static_cast<const typename Config::PositionType*>(params.positions);
  const float* table = static_cast<const float*>(params.table);
  if constexpr (Config::kTable) {
    if (!live) return;
    if (unit < kNumPairs / kCount) {
      const float* row = table + static_cast<int64>(positions[token]) * params.table_stride;
      rotation = rotation_from_table<kCount>(row, kNumPairs, unit * kCount);
    }
  } else {
    // A row of a table for each token of the block.
    alignas(16) __shared__ float rows[Config::kTokensPerBlock][2 * kNumPairs];
    if (live) {
      // The first frequency is on its way beside the position.
      float frequency = lane < kNumPairs ? table[lane] : 0.0f;
      const int64 position = positions[token];
      for (int pair = lane; pair < kNumPairs; pair += kThreadsPerToken) {
        if (pair > lane) frequency = table[pair];
        const Rotation<1> one = rotation_of_pair(position, frequency, params.factor);
        rows[place][pair] = one.cos[0];
        rows[place][kNumPairs + pair] = one.sin[0];
      }
    }
    __syncthreads();
    if (!live) return;
    constexpr int kBytes = kCount % 4 == 0 && kNumPairs % 4 == 0 ? 16 : 4;
    if (unit < kNumPairs / kCount) rotation = rotation_from_table<kCount, kBytes>(rows[place], kNumPairs, unit * kCount);
  }
  T* q_out = static_cast<T*>(params.q_out) + token * params.q_out_strides.outer;
  T* k_out = static_cast<T*>(params.k_out) + token * params.k_out_strides.outer;
  if (q_first) q_held.store(q_out + first_head * params.q_out_strides.inner + q_held.dim(unit), rotation);
  if (k_first) k_held.store(k_out + first_head * params.k_out_strides.inner + k_held.dim(unit), rotation);
  if (Config::kHeadsFirst && unit < kNumPairs / kCount) first_head += Config::kHeadLanes;
  rope_heads<Config, T>(q, q_out, params.q_strides.inner, params.q_out_strides.inner, first_head, params.num_q_heads, unit,
                        rotation);
  rope_heads<Config, T>(k, k_out, params.k_strides.inner, params.k_out_strides.inner, first_head, params.num_k_heads, unit,
                        rotation);
}

}  // namespace fi
