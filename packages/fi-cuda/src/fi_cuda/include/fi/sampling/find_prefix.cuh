// The shortest prefix of a row's rank order whose count or mass reaches a target, without sorting.
//
// A level sums up the amounts in 64 bins between the largest and the smallest logit in question, exactly, in integers; the bin
// at which the running sum reaches the target holds the prefix's last token. Two levels of bins of equal width leave a few dozen
// tokens, which the first block collects and compares with each other. Where more are left, levels between their extremes
// follow, in the bits of the floats; where all are equal, the last one is found by counting in index order. Bins are monotone in
// the logit, so no rounding changes the result, and the work hardly depends on the distribution.
#pragma once

#include "fi/sampling/ranked_tokens.cuh"

namespace fi {

// Bins for logits from `top` down to `bottom`, the first for the largest. Of equal width in the logit, the last one taking what
// lies below its own width too; of these, with `outer` of 0 or more, bin `outer` cut into as many again. Or, with a `shift` of 0
// or more, of equal width in the bits of the floats, infinities included.
struct RankScale {
  float top, bottom, per_unit;
  int shift, outer;

  __device__ __forceinline__ bool covers(float logit) const {
    return logit <= top && logit >= bottom && (outer < 0 || whole_bin((top - logit) * per_unit) == outer);
  }
  __device__ __forceinline__ int bin(float logit) const {
    if (shift >= 0) return static_cast<int>((order_key(top) - order_key(logit)) >> shift);
    const float place = (top - logit) * per_unit;
    return whole_bin(outer < 0 ? place : (place - static_cast<float>(outer)) * kRankBins);
  }
  __device__ __forceinline__ static int whole_bin(float place) { return min(__float2int_rz(place), kRankBins - 1); }
};

__device__ __forceinline__ RankScale bit_scale(float top, float bottom) {
  // The least shift that leaves no more bins than there are.
  static_assert(kRankBins == 64);
  const int shift = 26 - __clz(static_cast<int>(order_key(top) - order_key(bottom)));
  return {top, bottom, 0.0f, max(shift, 0), -1};
}

// Of a whole row: as wide as tokens have mass. Tokens without are counted, but those at -inf are not.
__device__ __forceinline__ RankScale row_scale(float largest, float smallest, bool by_count) {
  const float bottom = fmaxf(largest - kMasslessShortfall, smallest);
  const float per_unit = largest > bottom ? __fdividef(static_cast<float>(kRankBins), largest - bottom) : 0.0f;
  return {largest, by_count ? -3.402823466e38f : bottom, per_unit, -1, -1};
}

template <class Config>
struct PrefixSearch {
  using Row = ClusterRow<Config>;
  static constexpr int kBlocks = Row::kBlocks, kThreads = Row::kThreads, kWarps = Row::kWarps;

  Row& row;
  RankPrefix considered;  // only these tokens are weighed
  bool by_count;          // each as 1, else by its mass

  __device__ __forceinline__ uint64 amount_of(float logit) const { return by_count ? 1 : mass_at(row.largest - logit); }

  __device__ __forceinline__ void clear() {
    auto& columns = row.shared.search.columns;
#pragma unroll 1
    for (int idx = static_cast<int>(threadIdx.x); idx < 2 * kRankBins * 32 / 4; idx += kThreads) {
      reinterpret_cast<uint4*>(columns)[idx] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
  }

  // Every block's histogram into search.parts of all blocks; leaves the columns clear.
  __device__ __forceinline__ void sum_bins(const RankScale& scale) {
    auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    for_each_four<Config, 1>(row.shared.slice, [&](int place, float4 four) {
      const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (scale.covers(logits[e]) && considered.has(logits[e], row.first_token + place + e)) {
          const uint64 amount = amount_of(logits[e]);
          const int bin = scale.bin(logits[e]);
          const unsigned high = static_cast<unsigned>(amount >> 16);
          atomicAdd(&search.columns[0][bin][lane], static_cast<unsigned>(amount) & 0xffffu);
          if (high != 0) atomicAdd(&search.columns[1][bin][lane], high);
        }
      }
    });
    __syncthreads();
    uint64* parts = search.parts[scale.outer < 0 ? 0 : 1];
    const Message kind = scale.outer < 0 ? kParts : kPartsAgain;
#pragma unroll 1
    for (int bin = warp; bin < kRankBins; bin += kWarps) {
      const unsigned low = __reduce_add_sync(0xffffffffu, search.columns[0][bin][lane]);
      const unsigned high = __reduce_add_sync(0xffffffffu, search.columns[1][bin][lane]);
      search.columns[0][bin][lane] = 0;
      search.columns[1][bin][lane] = 0;
      row.mailbox.send_to_all(kind, &parts[row.rank * kRankBins + bin], low + (static_cast<uint64>(high) << 16));
    }
    row.mailbox.receive(kind, kBlocks * kRankBins * 8);
  }

  // After sum_bins: the bin at which the running sum over the row reaches what is wanted of it (target_of(total)), and in
  // `wanted` what it lacks before that bin; -1 if all bins do not reach it.
  template <class TargetOf>
  __device__ __forceinline__ int boundary_bin(const RankScale& scale, TargetOf target_of, uint64& wanted) {
    auto& search = row.shared.search;
    const uint64* parts = search.parts[scale.outer < 0 ? 0 : 1];
    if (threadIdx.x < 32) {
      const int lane = static_cast<int>(threadIdx.x);
      uint64 first = 0, second = 0;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const ulonglong2 two = *reinterpret_cast<const ulonglong2*>(&parts[block * kRankBins + 2 * lane]);
        first += two.x;
        second += two.y;
      }
      const Prefix<uint64> prefix = prefix_over_lanes<32>(first + second);
      const uint64 target = target_of(prefix.total);
      if (prefix.exclusive < target && target <= prefix.inclusive) {
        const bool in_first = target <= prefix.exclusive + first;
        search.boundary_bin = 2 * lane + (in_first ? 0 : 1);
        search.boundary_wanted = target - prefix.exclusive - (in_first ? 0 : first);
      } else if (lane == 0 && target > prefix.total) {
        search.boundary_bin = -1;
      }
      if (lane == 0) search.list_count = 0;
    }
    __syncthreads();
    wanted = search.boundary_wanted;
    return search.boundary_bin;
  }

  // Sends the tokens of `bin` to the first block and what was found to all: their number, smallest and largest logit.
  // Returns that of the whole row; `fits`: the first block has them all.
  __device__ __forceinline__ BoundaryShare collect(const RankScale& scale, int bin, bool& fits) {
    auto& shared = row.shared;
    auto& search = shared.search;
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
        if (lane == 0 && lanes != 0) base = atomicAdd(&search.list_count, __popc(lanes));
        const int slot = __shfl_sync(0xffffffffu, base, 0) + __popc(lanes & ((1u << lane) - 1));
        if (taken) {
          low = fminf(low, logit);
          high = fmaxf(high, logit);
          if (slot < kListPerBlock) {
            row.mailbox.send(kList, 0, &search.list[row.rank * kListPerBlock + slot],
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
      low = reduce_over_lanes<32>(shared.warp_smallest[lane % kWarps], smaller);
      high = reduce_over_lanes<32>(shared.warp_largest[lane % kWarps], LargestNumber());
      const unsigned count = static_cast<unsigned>(search.list_count);
      row.mailbox.send_to_all(kShares, reinterpret_cast<uint4*>(&search.shares[row.rank]),
                              make_uint4(count, __float_as_uint(low), __float_as_uint(high), 0u));
    }
    row.mailbox.receive(kShares, kBlocks * 16);
    BoundaryShare sum = {0, -minus_infinity(), minus_infinity(), 0};
    int listed = 0;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const BoundaryShare share = search.shares[block];
      listed += min(share.count, kListPerBlock);
      sum.count += share.count;
      sum.smallest = fminf(sum.smallest, share.smallest);
      sum.largest = fmaxf(sum.largest, share.largest);
    }
    fits = listed == sum.count && sum.count <= kComparedTokens;
    if (row.rank == 0) row.mailbox.receive(kList, 8u * static_cast<unsigned>(listed));
    return sum;
  }

  __device__ __forceinline__ void publish(RankPrefix found) {
#pragma unroll 1
    for (unsigned block = 0; block < kBlocks; ++block) {
      row.mailbox.send(kFound, block, reinterpret_cast<uint2*>(&row.shared.search.found),
                       make_uint2(__float_as_uint(found.value), static_cast<unsigned>(found.last)));
    }
  }

  // Of equal logits, the token that is number `number` (from 0) in index order ends the prefix.
  __device__ __forceinline__ void publish_tie(float value, int number) {
    int before = 0;
    int owner = 0;
#pragma unroll 1
    while (owner < kBlocks - 1 && number >= before + row.shared.search.shares[owner].count) {
      before += row.shared.search.shares[owner++].count;
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
    const RankedToken* tokens = gather_list(row, [&](float logit) { return amount_of(logit); });
    const int place = static_cast<int>(threadIdx.x) / kComparers<kThreads>;
    const RankedToken own = place < count ? tokens[place] : RankedToken{0, 0};
    int rank;
    const uint64 before = compare_with_all<kThreads>(tokens, count, own, rank);
    __syncthreads();  // what follows a published prefix overwrites the tokens
    if (static_cast<int>(threadIdx.x) % kComparers<kThreads> == 0 && before < wanted && wanted <= before + own.amount) {
      publish({logit_of(own.rank_key), static_cast<int>(token_of(own.rank_key))});
    }
  }

  // The prefix; `target_of(total)` (1 or more) says what it is to reach, from the amount of all considered tokens. Every
  // considered token if all of them do not reach it.
  template <class TargetOf>
  __device__ __forceinline__ RankPrefix find(TargetOf target_of) {
    return find_from(row_scale(row.largest, row.smallest, by_count), target_of);
  }

  // The same with the bins of the first level given.
  template <class TargetOf>
  __device__ __forceinline__ RankPrefix find_from(RankScale scale, TargetOf target_of) {
    uint64 wanted = 0;
    clear();
#pragma unroll 1
    for (bool first_level = true;; first_level = false) {
      sum_bins(scale);
      const uint64 lacking = wanted;
      const int bin =
          boundary_bin(scale, [&](uint64 total) { return first_level ? target_of(total) : lacking; }, wanted);
      if (bin < 0) return considered;
      if (scale.shift < 0 && scale.outer < 0) {
        scale.outer = bin;
        continue;
      }
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
        clear();
        continue;
      }
      row.mailbox.receive(kFound, 8);
      return shorter(considered, row.shared.search.found);
    }
  }
};

}  // namespace fi
