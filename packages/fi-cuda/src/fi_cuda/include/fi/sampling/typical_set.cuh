// The locally typical tokens of a row (Meister et al., 2023), as fi_core.sample defines them: ranked by how far a token's shortfall
// is from the mean shortfall, ascending, then by index, those before which less than the wanted mass lies.
//
// A row that no other filter has shortened is, with kBracket, decided by a bracket (bracket_search.cuh) of distances, chosen from the
// bins of bracket_estimate.cuh: two parts of the row, one on each side of the mean. Of other rows, and where the bracket cannot tell,
// the distances' bits are in their order, as floats of at least 0: levels of 64 bins over ever lower bits, with exact sums of masses,
// lead to the distance at which the running sum reaches what is wanted. Of the tokens at exactly that distance, some in each block,
// the running sum in index order decides. Nothing depends on the order of additions.
#pragma once

#include "fi/sampling/bracket_search.cuh"
#include "fi/sampling/find_prefix.cuh"

namespace fi {

// The rank order: nearest to the mean first.
struct ByDistance {
  float largest, mean;

  __device__ __forceinline__ static float distance(float shortfall, float mean) { return fabsf(shortfall - mean); }
  __device__ __forceinline__ float top() const { return 0.0f; }
  __device__ __forceinline__ float value(float logit) const { return -distance(largest - logit, mean); }
  __device__ __forceinline__ float place(float, float value) const { return fabsf(value); }
  __device__ __forceinline__ Marks marks(float low, float high) const { return Marks::between(fabsf(fminf(high, 0.0f)), fabsf(low)); }
};

// The first tokens of that order.
struct TypicalSet {
  ByDistance order;
  RankPrefix prefix;

  __device__ __forceinline__ bool has(float logit, int token) const { return prefix.has(order.value(logit), token); }
};

// About where in that order the kept mass ends.
template <class Config>
struct WindowEstimate {
  using Estimate = BracketEstimate<Config>;

  // What lies before a bin of shortfalls, and in it.
  struct Bin {
    float tokens_before, number, weight_before, weight;
  };
  struct Table {
    Bin bins[kRankBins];
    float means[kRankBins];
  };

  ClusterRow<Config>& row;
  float mean;

  // Where this block alone writes, and not before the bracket is known.
  __device__ __forceinline__ Table& table() const {
    static_assert(sizeof(Table) <= sizeof(row.shared.search.bracket_tokens));
    return *reinterpret_cast<Table*>(row.shared.search.bracket_tokens);
  }

  // As BracketEstimate has it, for distances.
  __device__ __forceinline__ bool run(float fraction, int margin) {
    Estimate estimate{row};
    if (!(row.largest > estimate.bottom())) return false;
    estimate.count(kClearsEarly<Config>);  // no other search comes before it
    if (threadIdx.x < 32) choose(estimate, fraction, margin);
    __syncthreads();
    return true;
  }

  __device__ __forceinline__ void choose(Estimate& estimate, float fraction, int margin) {
    const int lane = static_cast<int>(threadIdx.x);
    const auto bins = estimate.bins_of_lane();
    const Prefix<int> tokens = prefix_over_lanes<32>(bins.numbers[0] + bins.numbers[1]);
    const Prefix<float> weights = prefix_over_lanes<32>(bins.weight[0] + bins.weight[1]);
    const float numbers[2] = {static_cast<float>(bins.numbers[0]), static_cast<float>(bins.numbers[1])};
    const float before = static_cast<float>(tokens.exclusive);
    table().bins[2 * lane] = {before, numbers[0], weights.exclusive, bins.weight[0]};
    table().bins[2 * lane + 1] = {before + numbers[0], numbers[1], weights.exclusive + bins.weight[0], bins.weight[1]};
    table().means[2 * lane] = bins.mean[0];
    table().means[2 * lane + 1] = bins.mean[1];
    __syncwarp();
    const float farthest = farthest_of(row.largest - estimate.bottom());
    const float margin_tokens = static_cast<float>(margin), total = static_cast<float>(tokens.total);
    const float end = distance_at(bins.width, farthest, false, fraction * weights.total);
    const float number = window(bins.width, end).x;
    float low = -distance_at(bins.width, farthest, true, number + margin_tokens);
    float high = -distance_at(bins.width, farthest, true, number - margin_tokens);
    if (number + margin_tokens >= total) low = -farthest;
    if (number <= margin_tokens) high = -minus_infinity();
    if (lane == 0) {
      row.shared.search.bracket = make_float2(low, high);
      row.shared.search.list_count = 0;
    }
  }

  // The largest distance of a token with mass, where `deepest` is the largest shortfall of one.
  __device__ __forceinline__ float farthest_of(float deepest) const {
    return fmaxf(ByDistance::distance(0.0f, mean), ByDistance::distance(deepest, mean));
  }

  // Estimated number and weight of tokens up to a shortfall, each lane's own.
  __device__ __forceinline__ float2 up_to(float width, float shortfall) const {
    const float place = fminf(fmaxf(__fdividef(shortfall, width), 0.0f), static_cast<float>(kRankBins));
    const int idx = min(static_cast<int>(place), kRankBins - 1);
    const Bin bin = table().bins[idx];
    const float mean_place = table().means[idx];
    float part = place - static_cast<float>(idx), heavier;
    if (bin.number < 4.0f) {
      // Not spread over the bin: of the first tokens each has a part in the mass that decides.
      part = heavier = part >= mean_place ? 1.0f : 0.0f;
    } else {
      part -= Estimate::slope_of(mean_place) * part * (1.0f - part);
      heavier = part + 0.5f * width * part * (1.0f - part);  // a bin's first tokens weigh more than its last ones
    }
    return make_float2(bin.tokens_before + part * bin.number, bin.weight_before + heavier * bin.weight);
  }
  __device__ __forceinline__ float2 window(float width, float distance) const {
    const float2 upper = up_to(width, mean + distance), lower = up_to(width, mean - distance);
    return make_float2(upper.x - lower.x, upper.y - lower.y);
  }

  // The distance within which `wanted` is, of the number of tokens or of their weight: 32 places at a time are tried.
  __device__ __forceinline__ float distance_at(float width, float farthest, bool of_number, float wanted) const {
    float from = 0.0f, step = farthest / 32;
#pragma unroll 1
    for (int round = 0; round < 4; ++round) {
      const float2 reached = window(width, from + static_cast<float>(threadIdx.x + 1) * step);
      const unsigned lanes = __ballot_sync(0xffffffffu, (of_number ? reached.x : reached.y) >= wanted);
      from += static_cast<float>(lanes != 0 ? __ffs(static_cast<int>(lanes)) - 1 : 31) * step;
      step /= 32;
    }
    return from + 16 * step;
  }
};

template <class Config>
struct TypicalSearch {
  using Row = ClusterRow<Config>;
  using Bracket = BracketSearch<Config, ByDistance>;
  static constexpr int kBlocks = Row::kBlocks, kThreads = Row::kThreads, kWarps = Row::kWarps;
  static constexpr int kDistanceBits = 31, kLevelBits = 6;
  static_assert(1 << kLevelBits == kRankBins);
  // Wider than top_p's: where a few heavy tokens of one bin lie at the window's end, the estimate is off by as much as they weigh.
  static constexpr int kMargin = kBlocks < 8 ? 150 * kBlocks : 1200;
  static_assert(!Config::kBracket || 3 * kMargin <= kBlocks * SearchShared<Config>::kBracketTokens);

  Row& row;
  Answer answer = {};  // of a draw, if the bracket found it

  // The set that holds typical_p (below 1) of the mass of weight(place, logit), which is 0 for tokens that are not considered, and with
  // `alone` the row's for all; target_of(total) says what is wanted of it. All blocks have ended what they did before kAmounts was last
  // sent.
  template <class Weight, class TargetOf>
  __device__ __forceinline__ TypicalSet find(float typical_p, bool alone, Weight weight, TargetOf target_of) {
    const float mean = mean_shortfall(weight);
    TypicalSet found = {{row.largest, mean}, every_token()};
    if constexpr (Config::kBracket) {
      if (alone && WindowEstimate<Config>{row, mean}.run(typical_p, kMargin)) {
        Bracket bracket{row, found.order, Wish::kDraw};
        if (bracket.find(target_of, found.prefix)) {
          answer = bracket.answer;
          return found;
        }
      }
    }
    found.prefix = find_by_levels(mean, weight, target_of);
    return found;
  }

  // Of the tokens considered, by their masses.
  template <class Weight>
  __device__ __forceinline__ float mean_shortfall(Weight weight) {
    MassSum masses, moments;
    for_each_four<Config, 2>(row.shared.slice, [&](int place, float4 four) {
      const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float own = weight(place + e, logits[e]);
        masses.add(own);
        // An infinite shortfall times no mass is no part.
        moments.add(own >= kLeastWeight ? own * (row.largest - logits[e]) : 0.0f);
      }
    });
    const uint64 mass = sum_over_warp(masses.mass()), moment = sum_over_warp(moments.mass());
    if (threadIdx.x % 32 == 0) {
      row.shared.warp_amount[threadIdx.x / 32] = mass;
      row.shared.scratch[threadIdx.x / 32] = moment;
    }
    __syncthreads();
    uint64 before;
    const uint64 total = row.sum_over_blocks(before);
    // Every block has sent its sum, and so ended the searches before: their memory is free.
    const uint64 total_moment = total_of(row.shared.scratch);
    return static_cast<float>(static_cast<double>(total_moment) / static_cast<double>(total > 1 ? total : 1));
  }

  // The sum of all warps' amounts of all blocks, in all threads.
  __device__ __forceinline__ uint64 total_of(const uint64* amounts) {
    const uint4* shares = reinterpret_cast<const uint4*>(row.shared.search.shares);
    share(amounts);
    uint64 total = 0;
#pragma unroll 1
    for (int block = 0; block < kBlocks; ++block) {
      total += shares[block].x | static_cast<uint64>(shares[block].y) << 32;
    }
    return total;
  }

  // Every block's sum of its warps' amounts into search.shares; returns this block's in the first warp.
  __device__ __forceinline__ void share(const uint64* amounts) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (threadIdx.x < 32) {
      const uint64 own = sum_over_warp(lane < kWarps ? amounts[lane] : 0);
      row.mailbox.send_to_all(kShares, reinterpret_cast<uint4*>(&row.shared.search.shares[row.rank]),
                              make_uint4(static_cast<unsigned>(own), static_cast<unsigned>(own >> 32), 0u, 0u));
    }
    row.mailbox.receive(kShares, kBlocks * 16);
  }

  template <class Weight, class TargetOf>
  __device__ __forceinline__ RankPrefix find_by_levels(float mean, Weight weight, TargetOf target_of) {
    PrefixSearch<Config> bins{row, every_token(), false, Wish::kNothing};
    bins.clear();
    uint64 wanted = 0;
    unsigned path = 0;
    int end = kDistanceBits, parity = 0;
#pragma unroll 1
    do {
      const int shift = end > kLevelBits ? end - kLevelBits : 0;
      add_level(mean, path, shift, end, weight);
      const bool first = end == kDistanceBits;
      if (SearchShared<Config>::kHistograms == 1 && !first) row.meet();  // all have read the level before
      // A level's messages are not those of the one before, which some may still be reading.
      const RankScale scale = {0.0f, 0.0f, 0.0f, 0, parity - 1};
      bins.share_bins(scale);
      const uint64 left = wanted;
      const int bin = bins.boundary_bin(scale, [&](uint64 sum) { return first ? target_of(sum) : left; }, wanted);
      path = path << (end - shift) | static_cast<unsigned>(bin);
      end = shift;
      parity ^= 1;
    } while (end > 0);
    return {-__uint_as_float(path), last_at(mean, __uint_as_float(path), wanted, weight)};
  }

  // Adds up what the tokens weigh whose distance has the bits `path` above this level's, those from `shift` up to `end`.
  template <class Weight>
  __device__ __forceinline__ void add_level(float mean, unsigned path, int shift, int end, Weight weight) {
    auto& columns = row.shared.search.columns;
    const int lane = static_cast<int>(threadIdx.x) % PrefixSearch<Config>::kColumns;
    for_each_four<Config, 1>(row.shared.slice, [&](int place, float4 four) {
      const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const unsigned key = __float_as_uint(ByDistance::distance(row.largest - logits[e], mean));
        if (key >> end != path) continue;
        const uint2 limbs = mass_limbs(weight(place + e, logits[e]));
        const unsigned bin = key >> shift & ((1u << (end - shift)) - 1);
        atomicAdd(&columns[0][bin][lane], limbs.x);
        atomicAdd(&columns[1][bin][lane], limbs.y);
      }
    });
  }

  // The last token of this block that is kept of those at `distance`, of which `wanted` mass is: -1 if it is none.
  template <class Weight>
  __device__ __forceinline__ int last_at(float mean, float distance, uint64 wanted, Weight weight) {
    const auto tied = [&](int place, float logit) {
      const bool here = ByDistance::distance(row.largest - logit, mean) == distance;
      return here ? mass_limbs(weight(place, logit)) : make_uint2(0, 0);
    };
    row.sum_over_warps(tied);
    auto& shared = row.shared;
    const uint4* shares = reinterpret_cast<const uint4*>(shared.search.shares);
    share(shared.warp_amount);
    uint64 before = 0, own = 0;
#pragma unroll 1
    for (int block = 0; block <= row.rank; ++block) {
      before += own;
      own = shares[block].x | static_cast<uint64>(shares[block].y) << 32;
    }
    if (before >= wanted) return -1;
    if (before + own < wanted) return 0x7fffffff;
    row.locate(tied, wanted - before - 1, [&](int place) { shared.search.boundary_bin = place; });
    __syncthreads();
    return row.first_token + shared.search.boundary_bin;
  }
};

}  // namespace fi
