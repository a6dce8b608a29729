// A cluster's work on the row that it holds: extremes, sums and the place where a running sum crosses a target.
#pragma once

#include "fi/random/philox.cuh"
#include "fi/sampling/exchange.cuh"
#include "fi/sampling/penalties.cuh"
#include "fi/sampling/row.cuh"
#include "fi/sampling/row_filters.cuh"
#include "fi/sampling/weight.cuh"
#include "fi/tile/scan.cuh"

namespace fi {

template <bool kFirst, class First, class Second>
struct Choose {
  using Type = First;
};
template <class First, class Second>
struct Choose<false, First, Second> {
  using Type = Second;
};

// The first tokens of the rank order (descending logit, then ascending token): those above `value`, and those equal to it up
// to token `last`.
struct alignas(8) RankPrefix {
  float value;
  int last;

  __device__ __forceinline__ bool has(float logit, int token) const {
    return (logit > value) | ((logit == value) & (token <= last));  // three predicates, no branch
  }
};

__device__ __forceinline__ RankPrefix every_token() { return {minus_infinity(), 0x7fffffff}; }

__device__ __forceinline__ RankPrefix shorter(RankPrefix first, RankPrefix second) {
  const bool choose_first = first.value > second.value || (first.value == second.value && first.last < second.last);
  return choose_first ? first : second;
}

constexpr int kRankBins = 64;
constexpr int kGroupBins = 256;
constexpr int kMaxGroups = 256;
constexpr int kComparedTokens = 128;

// What a block found among the tokens at a boundary.
struct BoundaryShare {
  int count;
  float smallest, largest;
  int unused;
};

// A token's place in the rank order, larger first, and what it weighs.
struct alignas(16) RankedToken {
  uint64 rank_key, amount;
};

// What finding the last token that a filter keeps needs. Where top_p is alone PrefixSearch only serves rows that BracketSearch
// cannot, and is small, so that three blocks fit on a multiprocessor.
template <class Config>
struct alignas(16) SearchShared {
  static constexpr int kBlocks = Config::kClusterBlocks;
  static constexpr bool kSmall = Config::kSmallSearch;
  static constexpr int kColumns = kSmall ? 8 : 32;
  static constexpr int kListPerBlock = kSmall ? 64 : 128;
  static constexpr int kLocalTokens = kSmall ? 0 : 1024;
  static constexpr int kHistograms = kSmall ? 1 : 2;
  static constexpr int kPartWords = kBlocks * kRankBins > 512 ? kBlocks * kRankBins : 512;
  static constexpr int kBracketTokens = Config::kBracket ? 512 : 1;
  static constexpr int kBracketBlocks = Config::kBracket ? kBlocks : 1;

  union {
    struct {
      // A histogram with a column for each lane, or a few, so that lanes hardly collide: amounts as their lower 16 bits and the
      // rest, whose sums fit 32 bits. In the first block then the list of tokens at the boundary, (logit, token), a part for each
      // block.
      union {
        unsigned columns[2][kRankBins][kColumns];
        uint2 list[kBlocks * kListPerBlock];
      };
      // Every block's histogram, [block][bin]; twice where a second may come before the first is read. Before that the largest
      // logits of all groups and their histogram; after it the few tokens that are ranked.
      union {
        uint64 parts[kHistograms][kPartWords];
        struct {
          float groups[kMaxGroups];
          unsigned group_bins[kGroupBins];
        };
      };
      uint2 local[kLocalTokens + 1];  // this block's tokens in the bin that the first level chose, if they fit
    };
    // Of BracketSearch numbers of tokens, with a column for each lane; then this block's tokens in the bracket, (logit, token), and
    // every block's histogram of theirs, [block][bin]: masses, and from kCountShift on numbers.
    unsigned counts[kRankBins][32];
    struct {
      uint2 bracket_tokens[kBracketTokens];
      uint64 bracket_parts[kBracketBlocks][kRankBins];
    };
    uint4 own_groups[kMaxGroups / 4];  // on their way to the others
  };
  // Of BracketSearch, one after the other: every block's numbers; the row's tokens in the bin that was chosen.
  union {
    unsigned count_parts[kBracketBlocks][kRankBins];
    RankedToken boundary[Config::kBracket ? kComparedTokens : 1];
  };
  // A histogram on its way to all blocks; of BracketSearch then this block's of the bracket: masses as limbs, and numbers.
  union {
    alignas(16) uint64 own_bins[kRankBins];
    unsigned bracket_bins[3][Config::kBracket ? kRankBins : 1];
  };
  BoundaryShare shares[kBlocks];
  uint4 sums[kBracketBlocks];  // masses of each block's tokens: of all, from kCountShift on their number in the bracket; above it
  float2 bracket;              // logits from which and up to which it lasts
  uint4 found;                 // RankPrefix and Answer
  uint64 above[kBlocks];       // mass of each block's tokens before the boundary
  unsigned kept[2][kBlocks];   // and of the kept ones at it, lower 16 bits and the rest
  uint64 boundary_wanted;
  int boundary_bin;
  int local_count;  // tokens of this block in the chosen bin
  int list_count;   // tokens that this block put on the list
  int list_before;  // tokens on it of blocks before this one
  RankPrefix own_found;
  int num_ranked;
};

struct NoShared {};

template <class Config>
struct ClusterShared {
  static constexpr int kBlocks = Config::kClusterBlocks;
  static constexpr int kWarps = RowShape<Config>::kWarps;
  static constexpr int kMostGroups = kMaxGroups / (kBlocks * kWarps);  // of a warp
  static constexpr int kGroupLanes = kMostGroups >= 4 ? 8 : kMostGroups >= 2 ? 16 : 32;
  static constexpr int kWarpGroups = 32 / kGroupLanes;
  static constexpr int kGroups = kBlocks * kWarps * kWarpGroups;
  static_assert(kGroups <= kMaxGroups && kWarps * kWarpGroups % 4 == 0);

  alignas(16) float slice[RowShape<Config>::kSliceFloats];
  union {
    alignas(16) typename Choose<Config::kSearch, SearchShared<Config>, NoShared>::Type search;
    typename Choose<Config::kPenalised, PenaltyShared<RowShape<Config>::kBlockTokens>, NoShared>::Type penalties;  // while it is loaded
  };
  uint64 mail[kNumMessages];
  uint2 extremes[kBlocks];  // largest and smallest logit of each block
  uint64 block_amount[kBlocks];
  uint64 warp_amount[kWarps];
  uint64 scratch[kWarps];
  uint64 token;  // from the block that drew it
  RandomBits random;
  RowFilters filters;  // one thread loads them, and registers hold what is needed next
  float warp_largest[kWarps], warp_smallest[kWarps];
};

// A row whose only search begins with BracketEstimate clears its counts while it is loaded.
template <class Config>
constexpr bool kClearsEarly = Config::kBracket && !Config::kGroups && !Config::kPenalised;

// The largest logits of groups are sent where penalties still lie.
template <class Config>
constexpr bool kReadyLate = Config::kPenalised && Config::kGroups;

template <class Config>
__device__ __forceinline__ void clear_counts(SearchShared<Config>& search) {
#pragma unroll 1
  for (int idx = static_cast<int>(threadIdx.x); idx < kRankBins * 32 / 4; idx += Config::kNumThreads) {
    reinterpret_cast<uint4*>(search.counts)[idx] = make_uint4(0, 0, 0, 0);
  }
}

template <class Config>
__device__ __forceinline__ void clear_early(ClusterShared<Config>& shared) {
  if constexpr (kClearsEarly<Config>) clear_counts<Config>(shared.search);
}

// Sum over a warp of numbers below 2^51, in two instructions that add 32 bits.
__device__ __forceinline__ uint64 sum_over_warp(uint64 value) {
  const unsigned low = __reduce_add_sync(0xffffffffu, static_cast<unsigned>(value) & 0xffffffu);
  const unsigned high = __reduce_add_sync(0xffffffffu, static_cast<unsigned>(value >> 24));
  return low + (static_cast<uint64>(high) << 24);
}

template <class Config>
struct ClusterRow {
  using Shape = RowShape<Config>;
  using Shared = ClusterShared<Config>;
  static constexpr int kBlocks = Config::kClusterBlocks;
  static constexpr int kThreads = Config::kNumThreads;
  static constexpr int kWarps = Shape::kWarps;

  Shared& shared;
  Mailbox<kBlocks> mailbox;
  int rank, first_token, vocab_size;
  float largest, smallest;  // of the whole row
  float own_largest;        // of this thread's part, if Config::kGroups

  __device__ __forceinline__ explicit ClusterRow(Shared& memory)
      : shared(memory),
        mailbox{memory.mail},
        rank(cluster_rank<kBlocks>()),
        first_token(rank * Shape::kBlockTokens),
        vocab_size(0),
        largest(0.0f),
        smallest(0.0f),
        own_largest(0.0f) {
    end_slice<Config>(shared.slice);
    mailbox.open();
    if constexpr (!kReadyLate<Config>) mailbox.ready();
  }

  // Makes the row's extremes known to all blocks, and with `with_groups` the largest logits of all groups. The mailbox has
  // been opened by all.
  __device__ __forceinline__ void share_extremes(Extremes mine, bool with_groups, Message kind = kExtremes) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const float in_warp = largest_of_warp(mine.largest);
    const float least = smallest_of_warp(mine.smallest);
    if constexpr (Config::kGroups) {
      own_largest = mine.largest;
      const auto larger = [](float first, float second) { return ptx::max_or_nan(first, second); };
      const float group = reduce_over_lanes<Shared::kGroupLanes>(mine.largest, larger);
      float* own = reinterpret_cast<float*>(shared.search.own_groups);
      if (lane % Shared::kGroupLanes == 0) own[warp * Shared::kWarpGroups + lane / Shared::kGroupLanes] = group;
    }
    if (lane == 0) {
      shared.warp_largest[warp] = in_warp;
      shared.warp_smallest[warp] = least;
    }
    __syncthreads();
    if (warp == 0) {
      const float block_largest = largest_of_warp(shared.warp_largest[lane % kWarps]);
      const float block_smallest = smallest_of_warp(shared.warp_smallest[lane % kWarps]);
      mailbox.send_to_all(kind, &shared.extremes[rank],
                          make_uint2(__float_as_uint(block_largest), __float_as_uint(block_smallest)));
    }
    constexpr int kFours = kWarps * Shared::kWarpGroups / 4;
    if constexpr (Config::kGroups) {
      if (with_groups) {
        uint4* fours = reinterpret_cast<uint4*>(shared.search.groups) + rank * kFours;
#pragma unroll 1
        for (int idx = static_cast<int>(threadIdx.x); idx < kFours * kBlocks; idx += kThreads) {
          mailbox.send(kind, static_cast<unsigned>(idx / kFours), &fours[idx % kFours], shared.search.own_groups[idx % kFours]);
        }
      }
    }
    mailbox.receive(kind, kBlocks * (8 + (with_groups ? 16 * kFours : 0)));
    read_extremes();
  }

  // The block's place read again: from here on, and not before, it needs registers.
  __device__ __forceinline__ void read_rank() {
    if constexpr (kBlocks > 1) rank = static_cast<int>(ptx::rank_in_cluster_again());
    first_token = rank * Shape::kBlockTokens;
  }

  // Those shared last: read again, they need no registers in between.
  __device__ __forceinline__ void read_extremes() {
    const uint2 theirs = shared.extremes[threadIdx.x % kBlocks];
    largest = largest_of_warp(__uint_as_float(theirs.x));
    smallest = smallest_of_warp(__uint_as_float(theirs.y));
  }

  // After load_slice: divides by `temperature` and shares the extremes.
  __device__ __forceinline__ void share(Extremes mine, int num_tokens, float temperature, bool with_groups) {
    vocab_size = num_tokens;
    __syncwarp();  // narrow loads leave a lane's logits to others
    if (temperature != 1.0f) mine = divide_slice<Config>(shared.slice, vocab_size - first_token, temperature, mine);
    mailbox.opened();
    share_extremes(mine, with_groups);
  }

  // Whether a token can be drawn: no logit is NaN or +inf, and one is finite.
  __device__ __forceinline__ bool usable() const { return fabsf(largest) < -minus_infinity(); }

  // Each warp's sum of amount(place, logit), in limbs of 16 bits and the rest, into shared.warp_amount, whose previous use is
  // behind a barrier.
  template <class Amount>
  __device__ __forceinline__ void sum_over_warps(Amount amount) {
    unsigned low = 0, high = 0;
    for_each_four<Config, Config::kSearch ? 1 : 2>(shared.slice, [&](int place, float4 four) {
      const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint2 limbs = amount(place + e, logits[e]);
        low += limbs.x;
        high += limbs.y;
      }
    });
    uint64 sum = join_limbs(make_uint2(low, high));
    sum = sum_over_warp(sum);
    if (threadIdx.x % 32 == 0) shared.warp_amount[threadIdx.x / 32] = sum;
    __syncthreads();
  }

  // The same of the masses of weight(place, logit), numbers of at least 0.
  template <class Weight>
  __device__ __forceinline__ void sum_masses_over_warps(Weight weight) {
    MassSum masses;
    for_each_four<Config, Config::kSearch ? 2 : 4>(shared.slice, [&](int place, float4 four) {
      const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) masses.add(weight(place + e, logits[e]));
    });
    const uint64 sum = sum_over_warp(masses.mass());
    if (threadIdx.x % 32 == 0) shared.warp_amount[threadIdx.x / 32] = sum;
    __syncthreads();
  }

  // Returns when every block has called it: what they received before may be sent again.
  __device__ __forceinline__ void meet() {
    __syncthreads();
    if (threadIdx.x < 32) {
      mailbox.send_to_all(kShares, reinterpret_cast<uint2*>(&shared.search.shares[rank]), make_uint2(0, 0));
    }
    mailbox.receive(kShares, kBlocks * 8);
  }

  // What sum_masses_over_warps may take for the weight of any logit of the slice.
  __device__ __forceinline__ float weight(float logit) const { return weight_at(largest - logit); }
  __device__ __forceinline__ float weight_at(float shortfall) const {
    return kHasNan<Config> ? weight_or_none(shortfall) : weight_of(shortfall);
  }

  // The prefix sums of what sum_over_warps found, a warp's in each of the first kWarps lanes of every warp.
  __device__ __forceinline__ Prefix<uint64> prefix_over_warps(const uint64* amounts) const {
    constexpr int kLanes = lanes_for(kWarps);
    const int lane = static_cast<int>(threadIdx.x) % kLanes;  // all groups of lanes do the same
    return prefix_over_lanes<kLanes>(lane < kWarps ? amounts[lane] : 0);
  }

  // After sum_over_warps: the sum of the row, and of the blocks before this one. This block's own is shared.block_amount[rank].
  __device__ __forceinline__ uint64 sum_over_blocks(uint64& before) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (threadIdx.x < 32) {
      const uint64 own = sum_over_warp(lane < kWarps ? shared.warp_amount[lane] : 0);
      mailbox.send_to_all(kAmounts, &shared.block_amount[rank], own);
    }
    mailbox.receive(kAmounts, kBlocks * 8);
    uint64 total = 0;
    before = 0;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (block == rank) before = total;
      total += shared.block_amount[block];
    }
    return total;
  }

  // Sum over the block of numbers below 2^46. The previous use of `scratch` is behind a barrier.
  __device__ __forceinline__ uint64 sum_over_block(uint64 value) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    value = sum_over_warp(value);
    if (lane == 0) shared.scratch[threadIdx.x / 32] = value;
    __syncthreads();
    return sum_over_warp(lane < kWarps ? shared.scratch[lane] : 0);
  }

  // A thread's place in the prefix sums over the block.
  __device__ __forceinline__ Prefix<uint64> prefix_over_block(uint64 value) {
    const Prefix<uint64> inside = prefix_over_lanes<32>(value);
    const int warp = static_cast<int>(threadIdx.x / 32);
    if (threadIdx.x % 32 == 0) shared.scratch[warp] = inside.total;
    __syncthreads();
    const Prefix<uint64> warps = prefix_over_warps(shared.scratch);
    const uint64 before = __shfl_sync(0xffffffffu, warps.exclusive, warp);
    return {before + inside.exclusive, before + inside.inclusive, warps.total};
  }

  // After sum_over_warps: calls found(place) in one thread for the first place whose inclusive running sum of the block exceeds
  // `target`, which is below the block's sum.
  template <class Amount, class Found>
  __device__ __forceinline__ void locate(Amount amount, uint64 target, Found found) {
    const Prefix<uint64> warps = prefix_over_warps(shared.warp_amount);
    const int warp = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, target < warps.inclusive))) - 1;
    target -= __shfl_sync(0xffffffffu, warps.exclusive, warp);
    // All threads share that warp's tokens.
    constexpr int kEach = (Shape::kWarpTokens + kThreads - 1) / kThreads;
    const int first = static_cast<int>(threadIdx.x) * kEach;
    const int base = warp * Shape::kWarpTokens;
    uint64 sum = 0;
#pragma unroll 1
    for (int idx = first; idx < first + kEach; ++idx) {
      if (idx < Shape::kWarpTokens) sum += join_limbs(amount(base + idx, shared.slice[base + idx]));
    }
    const Prefix<uint64> prefix = prefix_over_block(sum);
    if (prefix.exclusive <= target && target < prefix.inclusive) {
      uint64 before = prefix.exclusive;
      int place = base + first - 1;
#pragma unroll 1
      do {
        ++place;
        before += join_limbs(amount(place, shared.slice[place]));
      } while (before <= target);
      found(place);
    }
  }
};

}  // namespace fi
