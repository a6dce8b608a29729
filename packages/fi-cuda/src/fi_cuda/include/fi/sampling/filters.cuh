// What top_k and top_p keep of a row.
#pragma once

#include "fi/sampling/bracket_search.cuh"
#include "fi/sampling/find_prefix.cuh"
#include "fi/sampling/tied_tokens.cuh"

namespace fi {

struct TiedEnd {
  RankPrefix kept = every_token();
  Answer answer = {};
  bool found = false;
  unsigned phases = 0;  // of the mailbox
};

// A TiedSearch as a function of its own, which the other rows' code has not in its way: a multiprocessor that has no code yet fetches it
// in order, and registers of rare rows would be all rows'.
template <class Config>
__device__ __noinline__ TiedEnd find_tied_end(ClusterRow<Config> row, Wish wish, bool has_target, float top_p) {
  TiedSearch<Config> search{row, wish};
  TiedEnd end;
  end.found = search.find(has_target, [&](uint64 total) { return RowFilters::share_of(top_p, total); }, end.kept);
  end.answer = search.answer;
  end.phases = row.mailbox.phases;
  return end;
}

// Where top_p is the only one of the two, what it keeps; false if kept_prefix must tell.
template <class Config>
__device__ __forceinline__ bool kept_by_bracket(ClusterRow<Config>& row, const RowFilters& filters, Wish wish, RankPrefix& kept,
                                                Answer& answer) {
  if (!filters.has_top_p() || filters.top_k > 0) return false;
  if (filters.min_p > 0.0f) wish = Wish::kNothing;
  const auto target_of = [&](uint64 total) { return filters.mass_target(total); };
  BracketEstimate<Config> estimate{row};
  const bool differ = estimate.run(filters.top_p, BracketSearch<Config>::kMargin);
  BracketSearch<Config> search{row, ByLogit{row.largest}, wish};
  bool found = differ && search.find(target_of, kept);
  if (found) answer = search.answer;
  // Where the bracket does not hold the end, it may be among many tokens of one logit.
  if (!found && !(differ && row.shared.search.boundary_bin >= 0)) {
    if (differ) {
      if (threadIdx.x < 32) estimate.choose_tied(filters.top_p);
    } else if (threadIdx.x == 0) {
      row.shared.search.bracket = make_float2(row.largest, row.largest);
    }
    __syncthreads();
    const TiedEnd end = find_tied_end(row, wish, differ, filters.top_p);
    row.mailbox.phases = end.phases;
    found = end.found;
    if (found) kept = end.kept;
    if (found) answer = end.answer;
  }
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
