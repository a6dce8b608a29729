// Quotients by divisors. Config: kNumThreads. Params: numbers and divisors [n] and output quotients [n], float; count.
#pragma once

#include "fi/sampling/row.cuh"

namespace fi {

template <class Config, class Params>
__device__ __forceinline__ void probe_quotient(const Params& params) {
  const int64 place = static_cast<int64>(blockIdx.x) * Config::kNumThreads + threadIdx.x;
  if (place >= params.count) return;
  const Divisor divisor(static_cast<const float*>(params.divisors)[place]);
  float four[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) four[e] = static_cast<const float*>(params.numbers)[place];
  divisor.divide(four);
  static_cast<float*>(params.quotients)[place] = four[place % 4];
}

}  // namespace fi
