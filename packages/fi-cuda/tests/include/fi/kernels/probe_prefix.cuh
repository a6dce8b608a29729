// A block's prefix sums, one value a thread. Config: Element, kGroup, kNumThreads.
#pragma once

#include "fi/tile/scan.cuh"

namespace fi {

template <class Config, class Params>
__device__ __forceinline__ void probe_prefix(const Params& params) {
  using T = typename Config::Element;
  __shared__ T scratch[(Config::kNumThreads + 31) / 32];
  const int64 place = static_cast<int64>(blockIdx.x) * Config::kNumThreads + threadIdx.x;
  const auto prefix = prefix_over_threads<Config::kGroup>(static_cast<const T*>(params.values)[place], scratch);
  static_cast<T*>(params.exclusive)[place] = prefix.exclusive;
  static_cast<T*>(params.inclusive)[place] = prefix.inclusive;
  static_cast<T*>(params.total)[place] = prefix.total;
}

}  // namespace fi
