// A row's parameters.
#pragma once

#include "fi/random/philox.cuh"
#include "fi/tile/host_device.cuh"

namespace fi {

// A row's parameters; "off" values where a filter is not used.
struct RowFilters {
  float temperature;  // 1 for a greedy row
  int top_k;          // 0: off
  float top_p, min_p, typical_p;
  bool joint, greedy;
  bool valid;  // every parameter is in its range

  __device__ __forceinline__ bool has_top_p() const { return top_p < 1.0f; }

  // What a prefix that is to hold top_p of `total` mass must reach; 1 keeps the first token.
  __device__ __forceinline__ uint64 mass_target(uint64 total) const { return share_of(top_p, total); }

  // `share` (below 1) of `total`, 1 at least.
  __device__ __forceinline__ static uint64 share_of(float share, uint64 total) {
    const float fraction = share * 2147483648.0f;  // exact; below 2^31
    const uint64 target = static_cast<uint64>(scale_fraction(__float2uint_rn(fraction), static_cast<int64>(total)));
    return target > 1 ? target : 1;
  }
};

// Row `place` of the columns temperature (float32 or null) and, where Config has the filter, top_k (int32), top_p, min_p and
// typical_p (float32).
template <class Config, class Params, class Place>
__device__ __forceinline__ RowFilters load_filters(const Params& params, Place place) {
  RowFilters filters = {1.0f, 0, 1.0f, 0.0f, 1.0f, params.joint != 0, false, true};
  if (params.temperature != nullptr) filters.temperature = static_cast<const float*>(params.temperature)[place];
  if constexpr (Config::kTopK) filters.top_k = static_cast<const int*>(params.top_k)[place];
  if constexpr (Config::kTopP) filters.top_p = static_cast<const float*>(params.top_p)[place];
  if constexpr (Config::kMinP) filters.min_p = static_cast<const float*>(params.min_p)[place];
  if constexpr (Config::kTypicalP) filters.typical_p = static_cast<const float*>(params.typical_p)[place];
  return filters;
}

// Of a row as its columns have it, what `valid` and `greedy` are for.
__device__ __forceinline__ void normalise(RowFilters& filters, int vocab_size) {
  // Comparisons that NaN fails.
  filters.valid = filters.temperature >= 0.0f && filters.top_k >= 0 && filters.top_p > 0.0f && filters.top_p <= 1.0f &&
                  filters.min_p >= 0.0f && filters.min_p <= 1.0f && filters.typical_p > 0.0f && filters.typical_p <= 1.0f;
  filters.greedy = filters.temperature <= 0.0f;
  if (filters.greedy) filters.temperature = 1.0f;
  if (filters.top_k >= vocab_size) filters.top_k = 0;
}

}  // namespace fi
