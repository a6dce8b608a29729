// Weights and masses of shortfalls. Config: kNumThreads. Params: shortfalls [n] and outputs weights [n], float; outputs masses [n],
// int64; count.
#pragma once

#include "fi/sampling/weight.cuh"

namespace fi {

template <class Config, class Params>
__device__ __forceinline__ void probe_weight(const Params& params) {
  const int64 place = static_cast<int64>(blockIdx.x) * Config::kNumThreads + threadIdx.x;
  if (place >= params.count) return;
  const float weight = weight_or_none(static_cast<const float*>(params.shortfalls)[place]);
  static_cast<float*>(params.weights)[place] = weight;
  static_cast<int64*>(params.masses)[place] = static_cast<int64>(mass_of(weight));
}

}  // namespace fi
