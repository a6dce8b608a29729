// Sums over lanes and blocks, in a fixed order: the same inputs give the same bits.
#pragma once

namespace fi {

// Sum over groups of kLanes consecutive lanes (a power of two up to 32); every lane of the group gets it.
template <int kLanes>
__device__ __forceinline__ float sum_over_lanes(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Sum over groups of kThreads consecutive threads of a block; every thread of the group gets it. `scratch` holds a float
// for each warp of the block; all threads of the block call this together.
template <int kThreads>
__device__ __forceinline__ float sum_over_threads(float value, float* scratch) {
  if constexpr (kThreads <= 32) {
    return sum_over_lanes<kThreads>(value);
  } else {
    constexpr int kWarps = kThreads / 32;
    value = sum_over_lanes<32>(value);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (threadIdx.x % 32 == 0) scratch[warp] = value;
    __syncthreads();
    const int first = warp / kWarps * kWarps;
    float total = 0.0f;
#pragma unroll
    for (int idx = 0; idx < kWarps; ++idx) total += scratch[first + idx];
    return total;
  }
}

}  // namespace fi
