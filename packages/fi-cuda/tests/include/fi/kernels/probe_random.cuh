// The random bits of a thread's key and the target they give. Config: kNumThreads. Params: seeds, positions, totals and
// outputs hi, lo, targets, all int64; samples, int; purpose.
#pragma once

#include "fi/random/philox.cuh"

namespace fi {

template <class Config, class Params>
__device__ __forceinline__ void probe_random(const Params& params) {
  const int64 place = static_cast<int64>(blockIdx.x) * Config::kNumThreads + threadIdx.x;
  const int64 seed = static_cast<const int64*>(params.seeds)[place];
  const int64 position = static_cast<const int64*>(params.positions)[place];
  const int sample = static_cast<const int*>(params.samples)[place];
  const RandomBits bits = random_bits(seed, position, sample, static_cast<Purpose>(params.purpose));
  static_cast<int64*>(params.hi)[place] = bits.hi;
  static_cast<int64*>(params.lo)[place] = bits.lo;
  static_cast<int64*>(params.targets)[place] = scale_bits(bits, static_cast<const int64*>(params.totals)[place]);
}

}  // namespace fi
