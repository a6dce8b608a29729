// Prefix sums over lanes and blocks, of int, int64, uint64 or float, in a fixed order: the same inputs give the same
// bits.
//
// For floats, the inclusive sum of a thread is bit for bit the exclusive sum of the next, but rounding may make sums of
// non-negative values descend: a search in them takes the last index that qualifies as its bound.
#pragma once

#include "fi/tile/reduce.cuh"

namespace fi {

// A thread's place in the prefix sums of its group: the sum of the values before its own, with its own, and of all.
template <class T>
struct Prefix {
  T exclusive, inclusive, total;
};

// The power of 2 that is at least `count`, lanes of a group that has one for each of them.
__host__ __device__ constexpr int lanes_for(int count) {
  int lanes = 1;
  while (lanes < count) lanes *= 2;
  return lanes;
}

// The sum of this lane's value and those of the lanes before it in its group of kLanes consecutive lanes (a power of
// two up to 32), in log2(kLanes) steps (Hillis and Steele, 1986). All lanes of the warp call this together.
template <int kLanes, class T>
__device__ __forceinline__ T inclusive_sum_over_lanes(T value) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const T before = __shfl_up_sync(0xffffffffu, value, distance, kLanes);
    if (lane >= distance) value = before + value;
  }
  return value;
}

template <int kLanes, class T>
__device__ __forceinline__ Prefix<T> prefix_over_lanes(T value) {
  const T inclusive = inclusive_sum_over_lanes<kLanes>(value);
  const T before = __shfl_up_sync(0xffffffffu, inclusive, 1, kLanes);
  const T total = __shfl_sync(0xffffffffu, inclusive, kLanes - 1, kLanes);
  return {static_cast<int>(threadIdx.x) % kLanes == 0 ? T(0) : before, inclusive, total};
}

// Over groups of kThreads consecutive threads of a block: lanes as above, then the warps' sums in ascending order.
// `scratch`, in shared memory, holds a T for each warp of the block; all threads of the block call this together, and
// the next use of `scratch` needs a __syncthreads() before it.
template <int kThreads, class T>
__device__ __forceinline__ Prefix<T> prefix_over_threads(T value, T* scratch) {
  if constexpr (kThreads <= 32) {
    return prefix_over_lanes<kThreads>(value);
  } else {
    constexpr int kWarps = kThreads / 32;
    const Prefix<T> inside = prefix_over_lanes<32>(value);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (threadIdx.x % 32 == 0) scratch[warp] = inside.total;
    __syncthreads();
    const int first = warp / kWarps * kWarps;
    T before = T(0);
    T total = T(0);
#pragma unroll
    for (int idx = 0; idx < kWarps; ++idx) {
      if (first + idx == warp) before = total;
      total += scratch[first + idx];
    }
    return {before + inside.exclusive, before + inside.inclusive, total};
  }
}

}  // namespace fi
