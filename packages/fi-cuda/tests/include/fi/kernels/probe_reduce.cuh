// Largest value, its first index and the sum of numbers over groups of a block's threads. Config: kGroup, kNumThreads.
#pragma once

#include "fi/tile/reduce.cuh"

namespace fi {

template <class Config, class Params>
__device__ __forceinline__ void probe_reduce(const Params& params) {
  constexpr int kWarps = (Config::kNumThreads + 31) / 32;
  __shared__ float floats[kWarps];
  __shared__ Candidate candidates[kWarps];
  __shared__ int64 numbers[kWarps];
  const int64 place = static_cast<int64>(blockIdx.x) * Config::kNumThreads + threadIdx.x;
  const float value = static_cast<const float*>(params.values)[place];
  const int idx = static_cast<int>(threadIdx.x) % Config::kGroup;
  const int64 number = static_cast<const int64*>(params.numbers)[place];
  static_cast<float*>(params.largest)[place] = reduce_over_threads<Config::kGroup>(value, floats, Largest());
  // Every third thread has nothing to offer.
  const Candidate own = threadIdx.x % 3 == 1 ? no_candidate() : Candidate{value, idx};
  const Candidate best = reduce_over_threads<Config::kGroup>(own, candidates, FirstOfLargest());
  static_cast<int*>(params.first_of_largest)[place] = best.idx;
  static_cast<int64*>(params.sums)[place] = sum_over_threads<Config::kGroup>(number, numbers);
}

}  // namespace fi
