// The locally typical tokens of a row (Meister et al., 2023), as fi_core.sample defines them: ranked by how far a token's shortfall
// is from the mean shortfall, ascending, then by index, those before which less than the wanted mass lies.
//
// The distances are floats of at least 0, so their bits are in their order: levels of 64 bins over ever lower bits of the distance,
// with exact sums of masses, lead to the distance at which the running sum reaches what is wanted. Of the tokens at exactly that
// distance, some in each block, the running sum in index order decides. Nothing depends on the order of additions.
#pragma once

#include "fi/sampling/find_prefix.cuh"

namespace fi {

// A token is in it if it is nearer to `mean` than `distance`, or as near and not after `last`.
struct TypicalSet {
  float mean, distance;
  int last;

  __device__ __forceinline__ static float distance_of(float shortfall, float mean) { return fabsf(shortfall - mean); }
  __device__ __forceinline__ bool has(float shortfall, int token) const {
    const float own = distance_of(shortfall, mean);
    return own < distance || (own == distance && token <= last);
  }
};

// All tokens, also those whose shortfall is infinite.
__device__ __forceinline__ TypicalSet every_typical() { return {0.0f, -minus_infinity(), 0x7fffffff}; }

template <class Config>
struct TypicalSearch {
  using Row = ClusterRow<Config>;
  static constexpr int kBlocks = Row::kBlocks, kThreads = Row::kThreads, kWarps = Row::kWarps;
  static constexpr int kDistanceBits = 31, kLevelBits = 6;
  static_assert(1 << kLevelBits == kRankBins);

  Row& row;

  // Adds up what the tokens weigh whose distance has the bits `path` above this level's, those from `shift` up to `end`.
  template <class Weight>
  __device__ __forceinline__ void add_level(float mean, unsigned path, int shift, int end, Weight weight) {
    auto& columns = row.shared.search.columns;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for_each_four<Config, 1>(row.shared.slice, [&](int place, float4 four) {
      const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float shortfall = row.largest - logits[e];
        const unsigned key = __float_as_uint(TypicalSet::distance_of(shortfall, mean));
        if (key >> end != path) continue;
        const uint2 limbs = mass_limbs(weight(place + e, logits[e]));
        const unsigned bin = key >> shift & ((1u << (end - shift)) - 1);
        atomicAdd(&columns[0][bin][lane], limbs.x);
        atomicAdd(&columns[1][bin][lane], limbs.y);
      }
    });
  }

  // Sum of the row of weight(place, logit) as a mass, in all threads; `kind` says through which messages.
  template <class Weight>
  __device__ __forceinline__ uint64 total_of(Message kind, uint4* shares, Weight weight) {
    row.sum_over_warps([&](int place, float logit) { return mass_limbs(weight(place, logit)); });
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (threadIdx.x < 32) {
      const uint64 own = sum_over_warp(lane < kWarps ? row.shared.warp_amount[lane] : 0);
      row.mailbox.send_to_all(kind, &shares[row.rank],
                              make_uint4(static_cast<unsigned>(own), static_cast<unsigned>(own >> 32), 0u, 0u));
    }
    row.mailbox.receive(kind, kBlocks * 16);
    uint64 total = 0;
#pragma unroll 1
    for (int block = 0; block < kBlocks; ++block) {
      total += shares[block].x | static_cast<uint64>(shares[block].y) << 32;
    }
    return total;
  }

  // The set that holds typical_p (below 1) of the mass of weight(place, logit), which is 0 for tokens that are not considered;
  // target_of(total) says what is wanted of it. All blocks have ended what they did before kAmounts was last sent.
  template <class Weight, class TargetOf>
  __device__ __forceinline__ TypicalSet find(Weight weight, TargetOf target_of) {
    auto& search = row.shared.search;
    row.sum_over_warps([&](int place, float logit) { return mass_limbs(weight(place, logit)); });
    uint64 before;
    const uint64 total = row.sum_over_blocks(before);
    // Every block has sent its sum, and so ended the searches before: their memory is free.
    const uint64 moment = total_of(kShares, reinterpret_cast<uint4*>(search.shares), [&](int place, float logit) {
      const float own = weight(place, logit);
      return own >= kLeastWeight ? own * (row.largest - logit) : 0.0f;  // an infinite shortfall times no mass is no part
    });
    const float mean = static_cast<float>(static_cast<double>(moment) / static_cast<double>(total > 1 ? total : 1));
    PrefixSearch<Config> bins{row, every_token(), false, Wish::kNothing};
    bins.clear();
    uint64 wanted = 0;
    unsigned path = 0;
    int end = kDistanceBits, parity = 0;
#pragma unroll 1
    do {
      const int shift = end > kLevelBits ? end - kLevelBits : 0;
      add_level(mean, path, shift, end, weight);
      // A level's messages are not those of the one before, which some may still be reading.
      const RankScale scale = {0.0f, 0.0f, 0.0f, 0, parity - 1};
      bins.share_bins(scale);
      const uint64 left = wanted;
      const bool first = end == kDistanceBits;
      const int bin = bins.boundary_bin(scale, [&](uint64 sum) { return first ? target_of(sum) : left; }, wanted);
      path = path << (end - shift) | static_cast<unsigned>(bin);
      end = shift;
      parity ^= 1;
    } while (end > 0);
    return {mean, __uint_as_float(path), last_at(mean, __uint_as_float(path), wanted, weight)};
  }

  // The last token of this block that is kept of those at `distance`, of which `wanted` mass is: -1 if it is none.
  template <class Weight>
  __device__ __forceinline__ int last_at(float mean, float distance, uint64 wanted, Weight weight) {
    const auto tied = [&](int place, float logit) {
      const bool here = TypicalSet::distance_of(row.largest - logit, mean) == distance;
      return here ? mass_limbs(weight(place, logit)) : make_uint2(0, 0);
    };
    row.sum_over_warps(tied);
    auto& shared = row.shared;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint64 own = sum_over_warp(lane < kWarps ? shared.warp_amount[lane] : 0);
    uint4* shares = reinterpret_cast<uint4*>(shared.search.shares);
    if (threadIdx.x < 32) {
      row.mailbox.send_to_all(kShares, &shares[row.rank],
                              make_uint4(static_cast<unsigned>(own), static_cast<unsigned>(own >> 32), 0u, 0u));
    }
    row.mailbox.receive(kShares, kBlocks * 16);
    __syncthreads();  // all have read warp_amount
    uint64 before = 0;
#pragma unroll 1
    for (int block = 0; block < row.rank; ++block) before += shares[block].x | static_cast<uint64>(shares[block].y) << 32;
    if (before >= wanted) return -1;
    if (before + own < wanted) return 0x7fffffff;
    row.locate(tied, wanted - before - 1, [&](int place) { shared.search.boundary_bin = place; });
    __syncthreads();
    return row.first_token + shared.search.boundary_bin;
  }
};

}  // namespace fi
