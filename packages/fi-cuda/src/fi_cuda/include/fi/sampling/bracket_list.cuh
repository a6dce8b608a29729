// A block's tokens in a bracket of a row's values, and what follows from them alone where they are equal.
#pragma once

#include "fi/sampling/answer.cuh"

namespace fi {

// Numbers of at least 0 between two limits, as their bits are: those whose bits, less `first`, are at most `width`.
struct Marks {
  unsigned first, width;

  __device__ __forceinline__ static Marks between(float least, float largest) {
    const unsigned first = __float_as_uint(least);
    return {first, __float_as_uint(largest) - first};
  }
};

// A rank order: the token of the largest value is first, and of the lowest index of those with equal ones. A token's place, at
// least 0, does not fall as its value falls; those of a bracket's tokens are between `marks`.
struct ByLogit {
  float largest;

  __device__ __forceinline__ float top() const { return largest; }
  __device__ __forceinline__ float value(float logit) const { return logit; }
  __device__ __forceinline__ float place(float shortfall, float) const { return shortfall; }
  __device__ __forceinline__ Marks marks(float low, float high) const {
    return Marks::between(largest - fminf(high, largest), largest - low);
  }
};

template <class Config, class Order>
struct BracketList {
  using Row = ClusterRow<Config>;
  using Shared = SearchShared<Config>;
  static constexpr int kBlocks = Row::kBlocks, kThreads = Row::kThreads, kWarps = Row::kWarps;
  static constexpr int kRounds = RowShape<Config>::kRounds;
  static constexpr int kRoundsPerWord = 32;  // a bit for each four tokens
  static constexpr int kWords = (kRounds + kRoundsPerWord - 1) / kRoundsPerWord;
  static constexpr int kBinCountShift = 48;

  Row& row;
  Order order;

  // Rounds of for_each_four are in a word of `hits`, the last one in the lowest bit.
  __device__ __forceinline__ static constexpr int end_of(int word) {
    return (word + 1) * kRoundsPerWord < kRounds ? (word + 1) * kRoundsPerWord : kRounds;
  }

  // Of this thread's fours that are marked in `hits`, the tokens of values from `low` up to `high`.
  __device__ __forceinline__ void list(const unsigned (&hits)[kWords], float low, float high) const {
    auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
#pragma unroll 1
      for (unsigned left = hits[word]; left != 0; left &= left - 1) {
        const int round = end_of(word) - __ffs(static_cast<int>(left));
        const int place = warp * RowShape<Config>::kWarpTokens + (round * 32 + lane) * 4;
        const float4 four = *reinterpret_cast<const float4*>(row.shared.slice + place);
        const float logits[4] = {four.x, four.y, four.z, four.w};
        bool inside[4];
        int mine = 0;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float value = order.value(logits[e]);
          inside[e] = value <= high && value >= low;
          mine += inside[e] ? 1 : 0;
        }
        int slot = mine != 0 ? atomicAdd(&search.list_count, mine) : 0;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (inside[e] && slot < Shared::kBracketTokens) {
            search.bracket_tokens[slot] = make_uint2(__float_as_uint(logits[e]), static_cast<unsigned>(row.first_token + place + e));
          }
          slot += inside[e] ? 1 : 0;
        }
      }
    }
  }

  // Calls visit(logit, token) for this block's tokens in the bracket.
  template <class Visit>
  __device__ __forceinline__ void for_each_listed(Visit visit) const {
    const auto& search = row.shared.search;
    const int count = min(search.list_count, Shared::kBracketTokens);
#pragma unroll 1
    for (int idx = static_cast<int>(threadIdx.x); idx < count; idx += kThreads) {
      const uint2 entry = search.bracket_tokens[idx];
      visit(__uint_as_float(entry.x), static_cast<int>(entry.y));
    }
  }

  // Of equal width between the bracket's ends.
  struct Bins {
    float top, per_unit;

    __device__ __forceinline__ Bins(float largest_value, float2 bracket) : top(fminf(bracket.y, largest_value)) {
      per_unit = top > bracket.x ? __fdividef(static_cast<float>(kRankBins), top - bracket.x) : 0.0f;
    }
    __device__ __forceinline__ int of(float value) const { return min(__float2int_rz((top - value) * per_unit), kRankBins - 1); }
  };

  // What compare does where all tokens of the bin are equal, of which those of the lowest index are kept; false if they are not.
  // One message: the block that has the last one, if all are like its own, says which it is beside its extremes.
  __device__ __forceinline__ bool find_tied(const Bins& bins, int bin) {
    auto& shared = row.shared;
    auto& search = shared.search;
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    float low = -minus_infinity(), high = minus_infinity();
    for_each_listed([&](float logit, int) {
      if (bins.of(order.value(logit)) != bin) return;
      low = fminf(low, logit);
      high = fmaxf(high, logit);
    });
    low = smallest_of_warp(low);
    high = largest_of_warp(high);
    if (lane == 0) {
      shared.warp_smallest[warp] = low;
      shared.warp_largest[warp] = high;
    }
    if (threadIdx.x == 0) search.own_found.last = -1;
    __syncthreads();
    low = smallest_of_warp(shared.warp_smallest[lane % kWarps]);
    high = largest_of_warp(shared.warp_largest[lane % kWarps]);
    if (low == high) {
      if (threadIdx.x == 0) {
        for_each_block(bin, mass_at(row.largest - low), [&](int block, uint64, int last) {
          if (block == row.rank) search.local_count = last;
        });
      }
      __syncthreads();
      if (search.local_count >= 0) note_tied(low, search.local_count);
    }
    __syncthreads();
    if (warp == 0) {
      const uint4 share = make_uint4(static_cast<unsigned>(search.own_found.last), __float_as_uint(low), __float_as_uint(high), 0u);
      row.mailbox.send_to_all(kShares, reinterpret_cast<uint4*>(&search.shares[row.rank]), share);
    }
    row.mailbox.receive(kShares, kBlocks * 16);
    int token = -1;
#pragma unroll 1
    for (int block = 0; block < kBlocks; ++block) {
      const BoundaryShare share = search.shares[block];
      token = max(token, share.count);
      low = fminf(low, share.smallest);
      high = fmaxf(high, share.largest);
    }
    if (low != high) return false;
    if (threadIdx.x == 0) {
      search.own_found = {order.value(low), token};
      for_each_block(bin, mass_at(row.largest - low), [&](int block, uint64 mass, int) {
        search.kept[0][block] = static_cast<unsigned>(mass) & 0xffffu;
        search.kept[1][block] = static_cast<unsigned>(mass >> 16);
      });
    }
    __syncthreads();
    return true;
  }

  // Calls visit(block, mass, last) for each block where the bin's tokens weigh `each`: what is kept of its own, and which of them, from 0
  // in index order, is the last that is kept of all; -1 if none is.
  template <class Visit>
  __device__ __forceinline__ void for_each_block(int bin, uint64 each, Visit visit) const {
    const auto& search = row.shared.search;
    // That are kept of this block's and later ones'; where a block's are all without mass, others are not, and its answer is not used.
    int number = static_cast<int>((search.boundary_wanted + each - 1) / (each > 0 ? each : 1));
#pragma unroll 1
    for (int block = 0; block < kBlocks; ++block) {
      const int theirs = static_cast<int>(search.bracket_parts[block][bin] >> kBinCountShift);
      const int kept = min(number, theirs);
      visit(block, each * kept, number <= theirs ? number - 1 : -1);
      number -= kept;
    }
  }

  // The token that is number `number`, from 0, in index order of this block's listed ones of this logit.
  __device__ __forceinline__ void note_tied(float tied, int number) const {
    auto& search = row.shared.search;
    for_each_listed([&](float logit, int token) {
      if (logit != tied) return;
      int before = 0;
#pragma unroll 2
      for (int idx = 0; idx < search.list_count; ++idx) {
        const uint2 other = search.bracket_tokens[idx];
        if (__uint_as_float(other.x) == tied && static_cast<int>(other.y) < token) ++before;
      }
      if (before == number) search.own_found.last = token;
    });
  }
};

}  // namespace fi
