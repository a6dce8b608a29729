// A row's filters, and what top_k and top_p keep.
#pragma once

#include "fi/random/philox.cuh"
#include "fi/sampling/bracket_search.cuh"
#include "fi/sampling/find_prefix.cuh"

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
// typical_p (float32). Nothing here depends on what is loaded, so the row's own loads can follow at once.
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

__device__ __forceinline__ void normalise(RowFilters& filters, int vocab_size) {
  // Comparisons that NaN fails.
  filters.valid = filters.temperature >= 0.0f && filters.top_k >= 0 && filters.top_p > 0.0f && filters.top_p <= 1.0f &&
                  filters.min_p >= 0.0f && filters.min_p <= 1.0f && filters.typical_p > 0.0f && filters.typical_p <= 1.0f;
  filters.greedy = filters.temperature <= 0.0f;
  if (filters.greedy) filters.temperature = 1.0f;
  if (filters.top_k >= vocab_size) filters.top_k = 0;
}

// Where top_p is the only one of the two, what it keeps; false if kept_prefix must tell.
template <class Config>
__device__ __forceinline__ bool kept_by_bracket(ClusterRow<Config>& row, const RowFilters& filters, Wish wish, RankPrefix& kept,
                                                Answer& answer) {
  if (!filters.has_top_p() || filters.top_k > 0) return false;
  BracketSearch<Config> search{row, filters.min_p > 0.0f ? Wish::kNothing : wish};
  const bool found = search.find(filters.top_p, [&](uint64 total) { return filters.mass_target(total); }, kept);
  if (found) answer = search.answer;
  row.read_extremes();
  return found;
}

// What top_k and top_p keep of a row, and the answer to a wish if no other filter follows; of a draw only once
// row.shared.random is set.
template <class Config>
__device__ __forceinline__ RankPrefix kept_prefix(ClusterRow<Config>& row, const RowFilters& filters, Wish wish,
                                                  Answer& answer) {
  // top_k beside a joint top_p, and min_p, may shorten what top_p leaves.
  if (filters.min_p > 0.0f || (filters.joint && filters.top_k > 0)) wish = Wish::kNothing;
  if (SearchShared<Config>::kSmall) wish = Wish::kNothing;  // it does not keep the first level's histogram
  RankPrefix kept = every_token();
  answer = Answer{};
  // One copy of the search's code serves both.
#pragma unroll 1
  for (int filter = 0; filter < 2; ++filter) {
    const bool by_count = filter == 0;
    if (by_count ? !Config::kTopK || filters.top_k == 0 : !Config::kTopP || !filters.has_top_p()) continue;
    PrefixSearch<Config> search{row, filters.joint ? every_token() : kept, by_count,
                                by_count ? Wish::kNothing : wish};
    kept = shorter(kept, search.find([&](uint64 total) {
      return by_count ? static_cast<uint64>(filters.top_k) : filters.mass_target(total);
    }));
    answer = search.answer;
  }
  return kept;
}

}  // namespace fi
