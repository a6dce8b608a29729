// A few tokens in the rank order (descending logit, then ascending token), in the cluster's first block.
#pragma once

#include "fi/sampling/cluster_row.cuh"

namespace fi {

constexpr int kComparedTokens = 128;

// Lanes that share the comparisons of one token, so that kComparedTokens of them keep a block busy.
template <int kThreads>
constexpr int kComparers = kThreads / kComparedTokens > 0 ? kThreads / kComparedTokens : 1;

// A token's place in the rank order, larger first, and what it weighs.
struct alignas(16) RankedToken {
  uint64 rank_key, amount;
};

__device__ __forceinline__ RankedToken ranked_token(float logit, int token, uint64 amount) {
  return {static_cast<uint64>(order_key(logit)) << 32 | (0xffffffffu - static_cast<unsigned>(token)), amount};
}

__device__ __forceinline__ unsigned token_of(uint64 rank_key) { return 0xffffffffu - static_cast<unsigned>(rank_key); }

__device__ __forceinline__ float logit_of(uint64 rank_key) {
  const unsigned key = static_cast<unsigned>(rank_key >> 32);
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Where the first block keeps them while no histogram is needed.
template <class Config>
__device__ __forceinline__ RankedToken* ranked_tokens(ClusterShared<Config>& shared) {
  return reinterpret_cast<RankedToken*>(shared.parts);  // and on through shared.totals
}

// The amount of those of `count` tokens that rank before `own`, and their number in `rank`; each group of kComparers lanes
// calls it with one token and gets the result.
template <int kThreads>
__device__ __forceinline__ uint64 compare_with_all(const RankedToken* tokens, int count, const RankedToken& own, int& rank) {
  rank = 0;
  uint64 before = 0;
#pragma unroll 2
  for (int idx = static_cast<int>(threadIdx.x) % kComparers<kThreads>; idx < count; idx += kComparers<kThreads>) {
    const RankedToken other = tokens[idx];
    if (other.rank_key > own.rank_key) {
      ++rank;
      before += other.amount;
    }
  }
  rank = sum_over_lanes<kComparers<kThreads>>(rank);
  return sum_over_lanes<kComparers<kThreads>>(before);
}

// The list of the first block (ClusterShared::list) in the registers of its threads, some tokens each; those that are out of
// question are dropped.
template <class Config>
struct HeldTokens {
  using Row = ClusterRow<Config>;
  static constexpr int kSlots = (kListEntries + Row::kThreads - 1) / Row::kThreads;

  float logits[kSlots];
  int tokens[kSlots];
  unsigned active = 0;  // a bit a slot

  __device__ __forceinline__ explicit HeldTokens(const Row& row) {
#pragma unroll
    for (int idx = 0; idx < kSlots; ++idx) {
      const int slot = static_cast<int>(threadIdx.x) + idx * Row::kThreads;
      const int block = slot / Row::kListPerBlock;
      const bool held = block < Row::kBlocks && slot % Row::kListPerBlock < row.shared.shares[block % Row::kBlocks].count;
      const uint2 entry = held ? row.shared.list[slot] : make_uint2(0, 0);
      logits[idx] = __uint_as_float(entry.x);
      tokens[idx] = static_cast<int>(entry.y);
      active |= held ? 1u << idx : 0u;
    }
  }

  // What a token ranks by, larger first.
  __device__ __forceinline__ float key(int idx, bool by_token) const {
    return by_token ? -static_cast<float>(tokens[idx]) : logits[idx];
  }

  // Calls visit(slot, key, logit) for this thread's tokens.
  template <class Visit>
  __device__ __forceinline__ void for_each(bool by_token, Visit visit) const {
#pragma unroll
    for (int idx = 0; idx < kSlots; ++idx) {
      if (active >> idx & 1) visit(idx, key(idx, by_token), logits[idx]);
    }
  }

  // Smallest and largest key of the block's tokens.
  __device__ __forceinline__ void extremes(Row& row, bool by_token, float& low, float& high) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const auto smaller = [](float first, float second) { return fminf(first, second); };
    low = -minus_infinity();
    high = minus_infinity();
    for_each(by_token, [&](int, float key, float) {
      low = fminf(low, key);
      high = fmaxf(high, key);
    });
    low = reduce_over_lanes<32>(low, smaller);
    high = reduce_over_lanes<32>(high, LargestNumber());
    if (lane == 0) {
      row.shared.warp_smallest[warp] = low;
      row.shared.warp_largest[warp] = high;
    }
    __syncthreads();
    low = reduce_over_lanes<32>(row.shared.warp_smallest[lane % Row::kWarps], smaller);
    high = reduce_over_lanes<32>(row.shared.warp_largest[lane % Row::kWarps], LargestNumber());
  }

  // Drops the tokens for which keep(slot) is false; returns how many the block has left.
  template <class Keep>
  __device__ __forceinline__ int keep_if(Row& row, Keep keep) {
#pragma unroll
    for (int idx = 0; idx < kSlots; ++idx) {
      if (active >> idx & 1 && !keep(idx)) active ^= 1u << idx;
    }
    if (threadIdx.x == 0) row.shared.num_ranked = 0;
    __syncthreads();
    const int in_warp = __reduce_add_sync(0xffffffffu, __popc(active));
    if (threadIdx.x % 32 == 0) atomicAdd(&row.shared.num_ranked, in_warp);
    __syncthreads();
    const int left = row.shared.num_ranked;
    __syncthreads();
    return left;
  }
};

}  // namespace fi
