// RoPE of q and k in one launch, in place or out of place.
//
// A block takes kTokensPerBlock tokens; a thread keeps one unit's cosines and sines and walks over the heads of its token.
// Its first kHeldHeads heads of q and its first of k are loaded before the angles, so that one does not wait for the other.
// What no table gives is computed once a token: each pair by one thread, for all through shared memory.
// Config: Dtype, PositionType, kHeadDim, kRotaryDim, kVectorBytes, kPairs, kAngleBytes (of a load from the table; 0: computed),
// kTokensPerBlock, kHeadLanes, kHeldHeads, kNumThreads.
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
  __device__ __forceinline__ void keep() {
    keep_whole(first);
    keep_whole(second);
  }
  __device__ __forceinline__ void store(T* target, const Rotation<kCount>& rotation) {
    rotate<Config::kPairs>(first, second, rotation);
    store_whole(target, first);
    store_whole(target + kSecond, second);
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
#pragma unroll 1
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
  constexpr bool kHasTable = Config::kAngleBytes > 0;
  constexpr int kUnits = kNumPairs / kCount + (Config::kHeadDim - Config::kRotaryDim) / kCount;
  constexpr int kThreadsPerToken = kUnits * Config::kHeadLanes;
  // Threads of one token that compute angles for each other.
  constexpr int kTeam = kThreadsPerToken;
  constexpr int kPairsEach = (kNumPairs + kTeam - 1) / kTeam;
  const unsigned thread = threadIdx.x;
  const int place = static_cast<int>(thread / kThreadsPerToken);
  const int64 token = static_cast<int64>(blockIdx.x) * Config::kTokensPerBlock + place;
  const int unit = static_cast<int>(thread % kUnits);
  const int teammate = static_cast<int>(thread % kTeam);
  const int first_head = static_cast<int>(thread % kThreadsPerToken / kUnits);
  const bool live = place < Config::kTokensPerBlock && token < params.num_tokens;
  const bool rotates = unit < kNumPairs / kCount;
  using Unit = HeadUnit<Config, T>;
  const int dim = Unit::dim(unit);
  // Where to find what is asked for first (of a token that may be read) is computed before the wait. The compiler would move it
  // behind, were it not for the branch.
  int64 read = live ? token : 0;
  int64 q_source = token * params.q_strides.outer + first_head * params.q_strides.inner + dim;
  int64 k_source = token * params.k_strides.outer + first_head * params.k_strides.inner + dim;
  asm volatile("" : "+l"(read), "+l"(q_source), "+l"(k_source));
  if (Config::kTokensPerBlock == 1 && token >= params.num_tokens) return;
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();

  const T* q = static_cast<const T*>(params.q);
  const T* k = static_cast<const T*>(params.k);
  const float* table = static_cast<const float*>(params.table);
  const int64 position = static_cast<const typename Config::PositionType*>(params.positions)[read];
  Pack<float, 4> frequencies[kPairsEach];
  if constexpr (!kHasTable) {
#pragma unroll
    for (int idx = 0; idx < kPairsEach; ++idx) frequencies[idx] = load_pack<4>(table + min(teammate + idx * kTeam, kNumPairs - 1));
  }
  const auto held_of = [&](int idx, int num_heads) { return live && rotates && first_head + idx * Config::kHeadLanes < num_heads; };
  Unit q_held[Config::kHeldHeads], k_held;
#pragma unroll
  for (int idx = 0; idx < Config::kHeldHeads; ++idx) {
    if (held_of(idx, params.num_q_heads)) q_held[idx].load(q + q_source + idx * Config::kHeadLanes * params.q_strides.inner);
  }
  if (held_of(0, params.num_k_heads)) k_held.load(k + k_source);

  Rotation<kCount> rotation = {};
  if constexpr (kHasTable) {
    if (!live) return;
    if (rotates) {
      const float* row = table + position * params.table_stride;
      rotation = rotation_from_table<kCount, Config::kAngleBytes>(row, kNumPairs, unit * kCount);
    }
  } else {
    // A row of a table for each team.
    alignas(16) __shared__ float rows[Config::kNumThreads / kTeam][2 * kNumPairs];
    float* row = rows[thread / kTeam];
#pragma unroll
    for (int idx = 0; idx < kPairsEach; ++idx) keep_whole(frequencies[idx]);
#pragma unroll
    for (int idx = 0; idx < kPairsEach; ++idx) {
      const int pair = teammate + idx * kTeam;
      if (live && pair < kNumPairs) {
        const Rotation<1> one = rotation_of_pair(position, frequencies[idx].data[0], params.factor);
        row[pair] = one.cos[0];
        row[kNumPairs + pair] = one.sin[0];
      }
    }
    if constexpr (kTeam == 32) {
      __syncwarp();
    } else {
      __syncthreads();
    }
    if (!live) return;
    constexpr int kBytes = kCount % 4 == 0 && kNumPairs % 4 == 0 ? 16 : 4;
    if (rotates) rotation = rotation_from_table<kCount, kBytes>(row, kNumPairs, unit * kCount);
  }
  T* q_out = static_cast<T*>(params.q_out) + token * params.q_out_strides.outer;
  T* k_out = static_cast<T*>(params.k_out) + token * params.k_out_strides.outer;
#pragma unroll
  for (int idx = 0; idx < Config::kHeldHeads; ++idx) q_held[idx].keep();
  k_held.keep();
#pragma unroll
  for (int idx = 0; idx < Config::kHeldHeads; ++idx) {
    const int head = first_head + idx * Config::kHeadLanes;
    if (held_of(idx, params.num_q_heads)) q_held[idx].store(q_out + head * params.q_out_strides.inner + dim, rotation);
  }
  if (held_of(0, params.num_k_heads)) k_held.store(k_out + first_head * params.k_out_strides.inner + dim, rotation);
  const int next_q = first_head + (rotates ? Config::kHeldHeads * Config::kHeadLanes : 0);
  const int next_k = first_head + (rotates ? Config::kHeadLanes : 0);
  rope_heads<Config, T>(q + token * params.q_strides.outer, q_out, params.q_strides.inner, params.q_out_strides.inner, next_q,
                        params.num_q_heads, unit, rotation);
  rope_heads<Config, T>(k + token * params.k_strides.outer, k_out, params.k_strides.inner, params.k_out_strides.inner, next_k,
                        params.num_k_heads, unit, rotation);
}

}  // namespace fi
