// A few tokens in the rank order (descending logit, then ascending token), in the cluster's first block.
#pragma once

#include "fi/sampling/cluster_row.cuh"

namespace fi {

// Lanes that share the comparisons of one token (a power of 2), so that kComparedTokens of them keep a block busy.
template <int kThreads>
constexpr unsigned kComparers = kThreads >= 4 * kComparedTokens ? 4 : kThreads >= 2 * kComparedTokens ? 2 : 1;

// Which of kComparedTokens this thread compares; as many or more: none.
template <int kThreads>
__device__ __forceinline__ int compared_place() {
  return static_cast<int>(threadIdx.x / kComparers<kThreads>);
}

__device__ __forceinline__ RankedToken ranked_token(float logit, int token, uint64 amount) {
  return {static_cast<uint64>(order_key(logit)) << 32 | (0xffffffffu - static_cast<unsigned>(token)), amount};
}

__device__ __forceinline__ unsigned token_of(uint64 rank_key) { return 0xffffffffu - static_cast<unsigned>(rank_key); }

__device__ __forceinline__ float logit_of(uint64 rank_key) { return float_of_key(static_cast<unsigned>(rank_key >> 32)); }

// Where the first block keeps up to kMaxRanked of them while no histogram is needed.
constexpr int kMaxRanked = 256;
template <class Config>
__device__ __forceinline__ RankedToken* ranked_tokens(ClusterShared<Config>& shared) {
  return reinterpret_cast<RankedToken*>(shared.search.parts[0]);
}

// The amount of those of `count` tokens, every `step`-th from the one of number `first`, that rank before `own`, and their number in `rank`.
__device__ __forceinline__ uint64 sum_before(const RankedToken* tokens, int count, const RankedToken& own, int first, int step, int& rank) {
  rank = 0;
  uint64 before = 0;
#pragma unroll 2
  for (int idx = first; idx < count; idx += step) {
    const RankedToken other = tokens[idx];
    if (other.rank_key > own.rank_key) {
      ++rank;
      before += other.amount;
    }
  }
  return before;
}

// Over a token's kComparers lanes, or twice as many.
template <int kThreads, class T>
__device__ __forceinline__ T sum_over_comparers(T value, bool twice) {
  value = sum_over_lanes<kComparers<kThreads>>(value);
  return twice ? value + __shfl_xor_sync(0xffffffffu, value, kComparers<kThreads>) : value;
}

// The same of all; each group of kComparers lanes calls it with one token and gets the result.
template <int kThreads>
__device__ __forceinline__ uint64 compare_with_all(const RankedToken* tokens, int count, const RankedToken& own, int& rank) {
  constexpr int kParts = kComparers<kThreads>;
  const uint64 before = sum_before(tokens, count, own, static_cast<int>(threadIdx.x % kParts), kParts, rank);
  rank = sum_over_lanes<kParts>(rank);
  return sum_over_lanes<kParts>(before);
}

// The first block's list as ranked tokens, block by block; amount_of(logit) is what one weighs. All threads of that block.
template <class Config, class Amount>
__device__ __forceinline__ RankedToken* gather_list(ClusterRow<Config>& row, Amount amount_of) {
  using Row = ClusterRow<Config>;
  auto& search = row.shared.search;
  static_assert(sizeof(RankedToken) * kMaxRanked <= sizeof(search.parts[0]));
  RankedToken* tokens = ranked_tokens(row.shared);
  const int lane = static_cast<int>(threadIdx.x % 32);
  // A warp for each block's part.
#pragma unroll 1
  for (int block = static_cast<int>(threadIdx.x / 32); block < Row::kBlocks; block += Row::kWarps) {
    const int place = __reduce_add_sync(0xffffffffu, lane < block ? search.shares[lane % Row::kBlocks].count : 0);
#pragma unroll 1
    for (int idx = lane; idx < search.shares[block].count; idx += 32) {
      const uint2 entry = search.list[block * SearchShared<Config>::kListPerBlock + idx];
      const float logit = __uint_as_float(entry.x);
      tokens[place + idx] = ranked_token(logit, static_cast<int>(entry.y), amount_of(logit));
    }
  }
  __syncthreads();
  return tokens;
}

}  // namespace fi
