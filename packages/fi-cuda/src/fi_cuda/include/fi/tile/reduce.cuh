// Reductions over lanes and blocks, in a fixed order: the same inputs give the same bits.
#pragma once

#include "fi/tile/host_device.cuh"

namespace fi {

__device__ __forceinline__ float minus_infinity() { return __int_as_float(static_cast<int>(0xff800000)); }

// A value and where it stands.
struct Candidate {
  float value;
  int idx;
};

// A place after every other, with the smallest value: what a thread without elements contributes.
__device__ __forceinline__ Candidate no_candidate() { return {minus_infinity(), 0x7fffffff}; }

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T first, T second) const {
    return first + second;
  }
};

// The larger; NaN if either is.
struct Largest {
  template <class T>
  __device__ __forceinline__ T operator()(T first, T second) const {
    return first > second || first != first ? first : second;
  }
};

// The larger number, ignoring NaN unless both are: one instruction.
struct LargestNumber {
  __device__ __forceinline__ float operator()(float first, float second) const { return fmaxf(first, second); }
};

// The larger value, NaN above all numbers; of equal ones the lower index. A total order, so no order of reduction
// changes the outcome.
struct FirstOfLargest {
  __device__ __forceinline__ Candidate operator()(Candidate first, Candidate second) const {
    const bool nan = first.value != first.value, other_nan = second.value != second.value;
    const bool equal = first.value == second.value || (nan && other_nan);
    const bool larger = first.value > second.value || (nan && !other_nan);
    return larger || (equal && first.idx < second.idx) ? first : second;
  }
};

template <class T>
__device__ __forceinline__ T from_lane_xor(T value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}
template <>
__device__ __forceinline__ Candidate from_lane_xor<Candidate>(Candidate value, int distance) {
  return {from_lane_xor(value.value, distance), from_lane_xor(value.idx, distance)};
}

// Over groups of kLanes lanes that are kStride apart (powers of two, kLanes * kStride <= 32); every lane of the group
// gets the result. `combine` must be commutative in every bit. All lanes of the warp call this together.
template <int kLanes, int kStride = 1, class T, class Combine>
__device__ __forceinline__ T reduce_over_lanes(T value, Combine combine) {
  static_assert(kLanes * kStride <= 32);
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = combine(value, from_lane_xor(value, distance * kStride));
  }
  return value;
}

// Over groups of kThreads consecutive threads of a block, warps in ascending order; every thread of the group gets the
// result. `scratch`, in shared memory, holds a T for each warp of the block; all threads of the block call this
// together, and the next use of `scratch` needs a __syncthreads() before it.
template <int kThreads, class T, class Combine>
__device__ __forceinline__ T reduce_over_threads(T value, T* scratch, Combine combine) {
  if constexpr (kThreads <= 32) {
    return reduce_over_lanes<kThreads>(value, combine);
  } else {
    constexpr int kWarps = kThreads / 32;
    value = reduce_over_lanes<32>(value, combine);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (threadIdx.x % 32 == 0) scratch[warp] = value;
    __syncthreads();
    const int first = warp / kWarps * kWarps;
    T total = scratch[first];
#pragma unroll
    for (int idx = 1; idx < kWarps; ++idx) total = combine(total, scratch[first + idx]);
    return total;
  }
}

template <int kLanes, class T>
__device__ __forceinline__ T sum_over_lanes(T value) {
  return reduce_over_lanes<kLanes>(value, Sum());
}

template <int kThreads, class T>
__device__ __forceinline__ T sum_over_threads(T value, T* scratch) {
  return reduce_over_threads<kThreads>(value, scratch, Sum());
}

}  // namespace fi
