// The shortest prefix of a row's rank order whose count or mass reaches a target, without sorting.
//
// Each level sums up the amounts in 448 bins of equal width between the largest and the smallest logit in question, exactly, in
// integers; the bin at which the running sum reaches the target holds the prefix's last token. Its tokens, a few hundred at
// most, are collected by the first block, which goes on alone. More than fit: another level, between their extremes. All
// equal: the last one is found by counting in index order. Bins are monotone in the logit, so no rounding changes the result.
#pragma once

#include "fi/sampling/cluster_row.cuh"
#include "fi/sampling/ranked_tokens.cuh"

namespace fi {

// Bins for logits from `top` down to `bottom`, the first for the largest. Of equal width in the logit, the last one taking what
// lies below its own width too; or, with a `shift` of 0 or more, of equal width in the bits of the floats, infinities included.
struct RankScale {
  float top, bottom, per_unit;
  int shift;

  __device__ __forceinline__ bool covers(float logit) const { return logit <= top && logit >= bottom; }
  __device__ __forceinline__ int bin(float logit) const {
    const int place = shift < 0 ? __float2int_rz((top - logit) * per_unit)
                                : static_cast<int>((order_key(top) - order_key(logit)) >> shift);
    return min(place, kRankBins - 1);
  }
};

__device__ __forceinline__ RankScale bit_scale(float top, float bottom) {
  // The least shift that leaves less than 256 bins.
  const int shift = 24 - __clz(static_cast<int>(order_key(top) - order_key(bottom)));
  return {top, bottom, 0.0f, max(shift, 0)};
}

// Of a whole row: as wide as tokens have mass. Tokens without are counted, but those at -inf are not.
__device__ __forceinline__ RankScale row_scale(float largest, float smallest, bool by_count) {
  const float bottom = fmaxf(largest - kMasslessShortfall, smallest);
  const float per_unit = largest > bottom ? static_cast<float>(kRankBins) / (largest - bottom) : 0.0f;
  return {largest, by_count ? -3.402823466e38f : bottom, per_unit, -1};
}

__device__ __forceinline__ void add_to_bin(uint2* bin, unsigned low, unsigned high) {
  atomicAdd(&bin->x, low);
  if (high != 0) atomicAdd(&bin->y, high);
}

// Where the running sum of `totals` reaches `wanted` (1 or more, at most their sum): returns the bin, and the sum before it in
// `before`. All threads of the block.
template <int kEach, class Config>
__device__ __forceinline__ int find_bin(ClusterShared<Config>& shared, const uint64 (&mine)[kEach],
                                        const Prefix<uint64>& prefix, uint64 wanted, uint64& before) {
  if (prefix.exclusive < wanted && wanted <= prefix.inclusive) {
    uint64 sum = prefix.exclusive;
    int bin = static_cast<int>(threadIdx.x) * kEach;
    bool reached = false;
#pragma unroll
    for (int idx = 0; idx < kEach - 1; ++idx) {
      reached = reached || sum + mine[idx] >= wanted;
      sum += reached ? 0 : mine[idx];
      bin += reached ? 0 : 1;
    }
    shared.boundary_bin = bin;
    shared.boundary_before = sum;
  }
  __syncthreads();
  before = shared.boundary_before;
  return shared.boundary_bin;
}

template <class Config>
struct PrefixSearch {
  using Row = ClusterRow<Config>;
  using Shape = RowShape<Config>;
  static constexpr int kBlocks = Row::kBlocks, kThreads = Row::kThreads;
  static constexpr int kEach = (kRankBins + kThreads - 1) / kThreads;  // bins a thread, in the prefix sums
  static_assert(kRankBins % kEach == 0 && kRankBins % kBlocks == 0 && kRankBins % 32 == 0);

  Row& row;
  RankPrefix considered;  // only these tokens are weighed
  bool by_count;          // each as 1, else by its mass

  __device__ __forceinline__ uint64 amount_of(float logit) const {
    return by_count ? 1 : mass_at(row.largest - logit);
  }

  __device__ __forceinline__ bool takes(const RankScale& scale, int place, float logit) const {
    return scale.covers(logit) && considered.has(logit, row.first_token + place);
  }

  // The row's histogram into shared.totals of every block.
  __device__ __forceinline__ void sum_bins(const RankScale& scale) {
    auto& shared = row.shared;
#pragma unroll 1
    for (int idx = static_cast<int>(threadIdx.x); idx < kRankBins; idx += kThreads) shared.list[idx] = make_uint2(0, 0);
    __syncthreads();
    for_each_four<Config, 1>(shared.slice, [&](int place, float4 four) {
      const float logits[4] = {four.x, four.y, four.z, four.w};
      int bins[4];
      unsigned low[4], high[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool taken = takes(scale, place + e, logits[e]);
        const uint64 amount = taken ? amount_of(logits[e]) : 0;
        bins[e] = taken ? scale.bin(logits[e]) : -1;
        low[e] = static_cast<unsigned>(amount) & 0xffffu;
        high[e] = static_cast<unsigned>(amount >> 16);
      }
      // Equal logits would queue up at one address, so a warp whose tokens are all in one bin adds them up first.
      const int first = __shfl_sync(0xffffffffu, bins[0], 0);
      const bool same = bins[0] == first && bins[1] == first && bins[2] == first && bins[3] == first;
      if (__all_sync(0xffffffffu, same)) {
        if (first >= 0) {
          const unsigned lows = __reduce_add_sync(0xffffffffu, low[0] + low[1] + low[2] + low[3]);
          const unsigned highs = __reduce_add_sync(0xffffffffu, high[0] + high[1] + high[2] + high[3]);
          if (threadIdx.x % 32 == 0) add_to_bin(&shared.list[first], lows, highs);
        }
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (bins[e] >= 0) add_to_bin(&shared.list[bins[e]], low[e], high[e]);
        }
      }
    });
    __syncthreads();
    // Block b sums up the b-th part of the bins and sends the sums to all.
    constexpr int kPerBlock = kRankBins / kBlocks;
#pragma unroll 1
    for (int idx = static_cast<int>(threadIdx.x); idx < kRankBins; idx += kThreads) {
      row.mailbox.send(kParts, static_cast<unsigned>(idx / kPerBlock), &shared.parts[idx % kPerBlock * kBlocks + row.rank],
                       shared.list[idx]);
    }
    row.mailbox.receive(kParts, kRankBins * 8);
#pragma unroll 1
    for (int idx = static_cast<int>(threadIdx.x); idx < kRankBins; idx += kThreads) {
      const uint2 part = shared.parts[idx];
      const uint64 sum = sum_over_lanes<kBlocks>(part.x + (static_cast<uint64>(part.y) << 16));
      row.mailbox.send(kTotals, static_cast<unsigned>(idx % kBlocks), &shared.totals[row.rank * kPerBlock + idx / kBlocks], sum);
    }
    row.mailbox.receive(kTotals, kRankBins * 8);
  }

  // Sends the tokens of `bin` to the first block and what was found to all: their number, smallest and largest logit.
  // Returns that of the whole row; `fits`: the first block has them all. shared.list_count is 0.
  __device__ __forceinline__ BoundaryShare collect(const RankScale& scale, int bin, bool& fits) {
    auto& shared = row.shared;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    float low = -minus_infinity(), high = minus_infinity();
    const auto in_bin = [&](float logit) { return scale.covers(logit) && scale.bin(logit) == bin; };
    for_each_four<Config>(shared.slice, [&](int place, float4 four) {
      const bool any = in_bin(four.x) || in_bin(four.y) || in_bin(four.z) || in_bin(four.w);
      if (!__any_sync(0xffffffffu, any)) return;
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {
        const float logit = e < 2 ? (e == 0 ? four.x : four.y) : (e == 2 ? four.z : four.w);
        const int token = row.first_token + place + e;
        const bool taken = in_bin(logit) && considered.has(logit, token);
        const unsigned lanes = __ballot_sync(0xffffffffu, taken);
        int base = 0;
        if (lane == 0 && lanes != 0) base = atomicAdd(&shared.list_count, __popc(lanes));
        const int slot = __shfl_sync(0xffffffffu, base, 0) + __popc(lanes & ((1u << lane) - 1));
        if (taken) {
          low = fminf(low, logit);
          high = fmaxf(high, logit);
          if (slot < Row::kListPerBlock) {
            row.mailbox.send(kList, 0, &shared.list[row.rank * Row::kListPerBlock + slot],
                             make_uint2(__float_as_uint(logit), static_cast<unsigned>(token)));
          }
        }
      }
    });
    const auto smaller = [](float first, float second) { return fminf(first, second); };
    low = reduce_over_lanes<32>(low, smaller);
    high = reduce_over_lanes<32>(high, LargestNumber());
    if (lane == 0) {
      shared.warp_smallest[warp] = low;
      shared.warp_largest[warp] = high;
    }
    __syncthreads();
    if (warp == 0) {
      low = reduce_over_lanes<32>(shared.warp_smallest[lane % Row::kWarps], smaller);
      high = reduce_over_lanes<32>(shared.warp_largest[lane % Row::kWarps], LargestNumber());
      const unsigned count = static_cast<unsigned>(shared.list_count);
      row.mailbox.send_to_all(kShares, reinterpret_cast<uint4*>(&shared.shares[row.rank]),
                              make_uint4(count, __float_as_uint(low), __float_as_uint(high), 0u));
    }
    row.mailbox.receive(kShares, kBlocks * 16);
    BoundaryShare sum = {0, -minus_infinity(), minus_infinity(), 0};
    int listed = 0;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const BoundaryShare share = shared.shares[block];
      listed += min(share.count, Row::kListPerBlock);
      sum.count += share.count;
      sum.smallest = fminf(sum.smallest, share.smallest);
      sum.largest = fmaxf(sum.largest, share.largest);
    }
    fits = listed == sum.count;
    if (row.rank == 0) row.mailbox.receive(kList, 8u * static_cast<unsigned>(listed));
    return sum;
  }

  __device__ __forceinline__ void publish(RankPrefix found) {
#pragma unroll 1
    for (unsigned block = 0; block < kBlocks; ++block) {
      row.mailbox.send(kFound, block, reinterpret_cast<uint2*>(&row.shared.found),
                       make_uint2(__float_as_uint(found.value), static_cast<unsigned>(found.last)));
    }
  }

  // Of `count` equal logits, the token that is number `number` (from 0) in index order ends the prefix.
  __device__ __forceinline__ void publish_tie(float value, int number) {
    int before = 0;
    int owner = 0;
#pragma unroll 1
    while (owner < kBlocks - 1 && number >= before + row.shared.shares[owner].count) {
      before += row.shared.shares[owner++].count;
    }
    if (owner != row.rank) return;
    const auto tied = [&](int place, float logit) -> uint64 {
      return logit == value && considered.has(logit, row.first_token + place) ? 1 : 0;
    };
    row.sum_over_warps(tied);
    row.locate(tied, static_cast<uint64>(number - before),
               [&](int place) { publish({value, row.first_token + place}); });
  }

  // By the first block, whose list has `count` tokens: the one at which the running sum in rank order reaches `wanted`.
  __device__ __forceinline__ void publish_from_list(int count, uint64 wanted) {
    auto& shared = row.shared;
    HeldTokens<Config> held(row);
    bool by_token = false;  // equal logits rank by token
#pragma unroll 1
    while (count > kComparedTokens) {
      float low, high;
      held.extremes(row, by_token, low, high);
      if (low == high) {
        by_token = true;
        __syncthreads();
        continue;
      }
      uint2* bins = reinterpret_cast<uint2*>(shared.totals);
#pragma unroll 1
      for (int idx = static_cast<int>(threadIdx.x); idx < kRankBins; idx += kThreads) bins[idx] = make_uint2(0, 0);
      __syncthreads();
      const RankScale scale = bit_scale(high, low);
      held.for_each(by_token, [&](int, float key, float logit) {
        const uint64 amount = amount_of(logit);
        add_to_bin(&bins[scale.bin(key)], static_cast<unsigned>(amount) & 0xffffu, static_cast<unsigned>(amount >> 16));
      });
      __syncthreads();
      uint64 mine[kEach];
      uint64 sum = 0;
#pragma unroll
      for (int idx = 0; idx < kEach; ++idx) {
        const int bin = static_cast<int>(threadIdx.x) * kEach + idx;
        const uint2 part = bin < kRankBins ? bins[bin] : make_uint2(0, 0);
        mine[idx] = part.x + (static_cast<uint64>(part.y) << 16);
        sum += mine[idx];
      }
      const Prefix<uint64> prefix = row.prefix_over_block(sum);
      uint64 before;
      const int bin = find_bin<kEach>(shared, mine, prefix, wanted, before);
      wanted -= before;
      count = held.keep_if(row, [&](int idx) { return scale.bin(held.key(idx, by_token)) == bin; });
    }
    // So few that each is compared with all others.
    RankedToken* tokens = ranked_tokens(shared);
    if (threadIdx.x == 0) shared.num_ranked = 0;
    __syncthreads();
    held.for_each(by_token, [&](int idx, float, float logit) {
      tokens[atomicAdd(&shared.num_ranked, 1)] = ranked_token(logit, held.tokens[idx], amount_of(logit));
    });
    __syncthreads();
    const int part = static_cast<int>(threadIdx.x) % kComparers<kThreads>;
    const int place = static_cast<int>(threadIdx.x) / kComparers<kThreads>;
    const RankedToken own = place < count ? tokens[place] : RankedToken{0, 0};
    int rank;
    const uint64 before = compare_with_all<kThreads>(tokens, count, own, rank);
    if (part == 0 && before < wanted && wanted <= before + own.amount) {
      publish({logit_of(own.rank_key), static_cast<int>(token_of(own.rank_key))});
    }
  }

  // The prefix; `target_of(total)` (1 or more) says what it is to reach, from the amount of all considered tokens. Every considered token
  // if all of them do not reach it.
  template <class TargetOf>
  __device__ __forceinline__ RankPrefix find(TargetOf target_of) {
    return find_from(row_scale(row.largest, row.smallest, by_count), target_of);
  }

  // The same with the bins of the first level given.
  template <class TargetOf>
  __device__ __forceinline__ RankPrefix find_from(RankScale scale, TargetOf target_of) {
    auto& shared = row.shared;
    uint64 wanted = 0;
    for (bool first_level = true;; first_level = false) {
      sum_bins(scale);
      uint64 mine[kEach];
      uint64 sum = 0;
#pragma unroll
      for (int idx = 0; idx < kEach; ++idx) {
        const int bin = static_cast<int>(threadIdx.x) * kEach + idx;
        mine[idx] = bin < kRankBins ? shared.totals[bin] : 0;
        sum += mine[idx];
      }
      if (threadIdx.x == 0) shared.list_count = 0;
      const Prefix<uint64> prefix = row.prefix_over_block(sum);
      if (first_level) wanted = target_of(prefix.total);
      if (wanted > prefix.total) return considered;
      uint64 before;
      const int bin = find_bin<kEach>(shared, mine, prefix, wanted, before);
      wanted -= before;
      bool fits;
      const BoundaryShare boundary = collect(scale, bin, fits);
      if (boundary.smallest == boundary.largest) {
        const uint64 each = amount_of(boundary.largest);
        const uint64 number = (wanted + each - 1) / each;
        if (number >= static_cast<uint64>(boundary.count)) return shorter(considered, {boundary.largest, 0x7fffffff});
        publish_tie(boundary.largest, static_cast<int>(number) - 1);
      } else if (fits) {
        if (row.rank == 0) publish_from_list(boundary.count, wanted);
      } else {
        scale = bit_scale(boundary.largest, boundary.smallest);
        continue;
      }
      row.mailbox.receive(kFound, 8);
      return shorter(considered, shared.found);
    }
  }
};

}  // namespace fi
