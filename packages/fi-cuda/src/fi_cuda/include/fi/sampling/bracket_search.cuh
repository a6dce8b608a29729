// The last token that top_p keeps of a whole row, in two passes over the slice.
//
// The first counts tokens in 64 bins of equal width in the logit. A bin's count times the weight of its middle says, to within a
// few hundred tokens, where in the rank order the kept mass ends; a bracket of logits holds kMargin tokens on each side. The
// second pass sums up exact masses, of all tokens and of those above the bracket, and marks the tokens in it, which go to the
// first block; it finds the last kept one among them. The estimate decides nothing: if the bracket proves not to hold the end, or
// too many tokens are alike, PrefixSearch takes over.
#pragma once

#include "fi/sampling/answer.cuh"
#include "fi/sampling/rank_scale.cuh"
#include "fi/sampling/ranked_tokens.cuh"

namespace fi {

template <class Config>
struct BracketSearch {
  using Row = ClusterRow<Config>;
  static constexpr int kBlocks = Row::kBlocks, kThreads = Row::kThreads, kWarps = Row::kWarps;
  static constexpr int kRounds = RowShape<Config>::kRounds;
  static constexpr int kRoundsPerWord = 8;  // a bit for each of 4 tokens
  static constexpr int kWords = (kRounds + kRoundsPerWord - 1) / kRoundsPerWord;
  static constexpr int kCapacity = SearchShared<Config>::kCandidates / kBlocks;  // a block's part of the list
  static constexpr int kMargin = 1000;
  static_assert(kBlocks <= kWarps && kThreads % 128 == 0 && kRounds * 4 < 256);

  Row& row;
  Wish wish;
  Answer answer = {};
  unsigned hits[kWords] = {};  // this thread's tokens in the bracket

  // False, in all blocks, if another search must do it, and then `found` is as it was; target_of(total mass), at least 1 and at
  // most that, is to be reached, which is about `fraction` of it.
  // With Wish::kDraw the drawn token's block also has, in row.shared.warp_amount, the kept mass of each warp's tokens.
  template <class TargetOf>
  __device__ __forceinline__ bool find(float fraction, TargetOf target_of, RankPrefix& found) {
    auto& search = row.shared.search;
    if (!(row.largest > bottom())) return false;
    count();
    if (threadIdx.x < 32) choose(fraction);
    __syncthreads();
    add_up(search.bracket.x, search.bracket.y);
    bool fits;
    const BracketShare sum = share(fits);
    const uint64 target = target_of(sum.total);
    if (!fits || target <= sum.above || target > sum.above + sum.listed) {
      // The first block has received the list, and every block has read the sums, before others may be sent.
      row.meet();
      return false;
    }
    if (row.rank == 0) publish(target - sum.above);
    row.mailbox.receive(kFound, 16);
    const RankPrefix last = read_message(search.found, answer);
    if (last.value != last.value) return false;
    if (wish == Wish::kDraw && static_cast<int>(answer.block) == row.rank) add_kept_to_warps(last);
    found = last;
    return true;
  }

  // From which logit on tokens have mass, or are. Whole warps; read again, the smallest logit needs no register in between.
  __device__ __forceinline__ float bottom() const {
    const float smallest = smallest_of_warp(__uint_as_float(row.shared.extremes[threadIdx.x % kBlocks].y));
    return fmaxf(row.largest - kMasslessShortfall, smallest);
  }

  // Numbers of the row's tokens in each bin, of every block, in search.parts: [block][bin], the bin of the largest logits first.
  __device__ __forceinline__ void count() {
    const float bottom = this->bottom();
    auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
    for (int idx = static_cast<int>(threadIdx.x); idx < kRankBins * 32 / 4; idx += kThreads) {
      reinterpret_cast<uint4*>(search.counts)[idx] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    // A word for each lane and bin, in the lane's bank, so that no two lanes collide whatever the distribution.
    unsigned char* column = reinterpret_cast<unsigned char*>(&search.counts[0][lane]);
    const float per_unit = __fdividef(1.0f, row.largest - bottom);
    const float offset = -bottom * per_unit;
    static_assert(sizeof(search.counts[0]) == 128);
    for_each_four<Config>(row.shared.slice, [&](int, float4 four) {
      const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        // From 0 at the bottom, also for NaN, to 1. In a float of 2^16, bins are the multiples of 2^7, a bin's bytes.
        const float place = __saturatef(fmaf(logits[e], per_unit, offset));
        const float bin = fmaf(place, kRankBins - 0.0078125f, 65536.0f);
        atomicAdd(reinterpret_cast<unsigned*>(column + (__float_as_uint(bin) & ((kRankBins - 1) * 128))), 1u);
      }
    });
    __syncthreads();
    unsigned* own = reinterpret_cast<unsigned*>(search.own_bins);
#pragma unroll 2
    for (int bin = warp; bin < kRankBins; bin += kWarps) {
      const unsigned sum = __reduce_add_sync(0xffffffffu, search.counts[bin][lane]);
      if (lane == 0) own[kRankBins - 1 - bin] = sum;
    }
    __syncthreads();
    uint4* parts = reinterpret_cast<uint4*>(search.parts[0]) + row.rank * (kRankBins / 4);
#pragma unroll 1
    for (int block = warp; block < kBlocks; block += kWarps) {
      if (lane < kRankBins / 4) {
        row.mailbox.send(kParts, static_cast<unsigned>(block), parts + lane, reinterpret_cast<const uint4*>(own)[lane]);
      }
    }
    row.mailbox.receive(kParts, kBlocks * kRankBins * 4);
  }

  // By the first warp, after count: search.bracket around the place at which the estimated weight reaches `fraction` of all.
  __device__ __forceinline__ void choose(float fraction) {
    const float bottom = this->bottom();
    auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x);
    const unsigned* parts = reinterpret_cast<const unsigned*>(search.parts[0]);
    int first = 0, second = 0;
#pragma unroll 4
    for (int block = 0; block < kBlocks; ++block) {
      const uint2 two = *reinterpret_cast<const uint2*>(&parts[block * kRankBins + 2 * lane]);
      first += static_cast<int>(two.x);
      second += static_cast<int>(two.y);
    }
    // Places without a token stand in the last bin.
    if (lane == 31) second -= kBlocks * kWarps * kRounds * 128 - row.vocab_size;
    const float width = (row.largest - bottom) / kRankBins;
    const auto middle_weight = [&](int bin) { return weight_of((static_cast<float>(bin) + 0.5f) * width); };
    // The largest logit's weight is known, and much of the whole in a peaked row.
    const float known = lane == 0 ? 1.0f : 0.0f;
    const float first_weight = (static_cast<float>(first) - known) * middle_weight(2 * lane) + known;
    const float second_weight = static_cast<float>(second) * middle_weight(2 * lane + 1);
    const Prefix<int> numbers = prefix_over_lanes<32>(first + second);
    const Prefix<float> weights = prefix_over_lanes<32>(first_weight + second_weight);
    const float weight = fraction * weights.total;
    const auto portion = [](float part, float whole) { return fminf(fmaxf(part / fmaxf(whole, 1e-30f), 0.0f), 1.0f); };
    const auto first_lane = [](bool reached) {
      const int lanes = static_cast<int>(__ballot_sync(0xffffffffu, reached));
      return lanes != 0 ? __ffs(lanes) - 1 : 31;
    };
    // After how many tokens the running weight reaches it.
    const bool later = weight > weights.exclusive + first_weight;
    const float lacking = weight - weights.exclusive - (later ? first_weight : 0.0f);
    float middle = static_cast<float>(numbers.exclusive + (later ? first : 0)) +
                   portion(lacking, later ? second_weight : first_weight) * static_cast<float>(later ? second : first);
    middle = __shfl_sync(0xffffffffu, middle, first_lane(weight <= weights.inclusive));
    // The logit after `place` tokens.
    const auto edge = [&](float place) {
      const bool in_second = place >= static_cast<float>(numbers.exclusive + first);
      const float passed = static_cast<float>(numbers.exclusive + (in_second ? first : 0));
      const float part = portion(place - passed, static_cast<float>(in_second ? second : first));
      const float logit = row.largest - (static_cast<float>(2 * lane + in_second) + part) * width;
      return __shfl_sync(0xffffffffu, logit, first_lane(place < static_cast<float>(numbers.inclusive)));
    };
    float low = edge(middle + kMargin), high = edge(fmaxf(middle - kMargin, 0.0f));
    if (middle + kMargin >= static_cast<float>(numbers.total)) low = bottom;
    if (middle <= kMargin) high = -minus_infinity();
    if (lane == 0) {
      search.bracket = make_float2(low, high);
      search.list_count = 0;
    }
  }

  // Rounds of for_each_four are in a word of `hits`, four bits each, the last one lowest.
  __device__ __forceinline__ static constexpr int end_of(int word) {
    return (word + 1) * kRoundsPerWord < kRounds ? (word + 1) * kRoundsPerWord : kRounds;
  }

  // The second pass: sums in row.shared, tokens from `low` up to `high` marked and sent.
  __device__ __forceinline__ void add_up(float low, float high) {
    MassSum total;
    MassSumAbove above;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      unsigned marked = 0;
#pragma unroll 2
      for (int round = word * kRoundsPerWord; round < end_of(word); ++round) {
        const float4 four = four_at(row.shared.slice, place_of_round<Config>(round));
        marked <<= 4;
        const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const double weight = MassSum::widen(weight_or_none(row.largest - logits[e]));
          total.add(weight);
          above.add_if_above(weight, logits[e], high);
          if (!(logits[e] > high) && logits[e] >= low) marked += 1u << e;
        }
      }
      hits[word] = marked;
    }
    const uint64 listed = sum_over_warp(send_marked());
    const uint64 all = sum_over_warp(total.mass()), before = sum_over_warp(above.mass());
    if (threadIdx.x % 32 == 0) {
      const int warp = static_cast<int>(threadIdx.x) / 32;
      row.shared.scratch[warp] = all;
      row.shared.warp_amount[warp] = before;
      row.shared.search.warp_listed[warp] = listed;
    }
    __syncthreads();
  }

  // Calls visit(logit, place) for this thread's marked tokens.
  template <class Visit>
  __device__ __forceinline__ void for_each_marked(Visit visit) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
#pragma unroll 1
      for (unsigned left = hits[word]; left != 0; left &= left - 1) {
        const int bit = __ffs(static_cast<int>(left)) - 1;
        const int round = end_of(word) - 1 - bit / 4;
        const int place = warp * RowShape<Config>::kWarpTokens + (round * 32 + lane) * 4 + bit % 4;
        visit(row.shared.slice[place], place);
      }
    }
  }

  // Sends this thread's marked tokens to the first block; returns their mass.
  __device__ __forceinline__ uint64 send_marked() {
    auto& search = row.shared.search;
    int mine = 0;
#pragma unroll
    for (int word = 0; word < kWords; ++word) mine += __popc(hits[word]);
    const Prefix<int> prefix = prefix_over_lanes<32>(mine);
    int base = 0;
    if (threadIdx.x % 32 == 0) base = atomicAdd(&search.list_count, prefix.total);
    int slot = __shfl_sync(0xffffffffu, base, 0) + prefix.exclusive;
    MassSum masses;
    for_each_marked([&](float logit, int place) {
      masses.add(weight_of(row.largest - logit));
      if (slot < kCapacity) {
        row.mailbox.send(kList, 0, &search.candidates[row.rank * kCapacity + slot],
                         make_uint2(__float_as_uint(logit), static_cast<unsigned>(row.first_token + place)));
      }
      ++slot;
    });
    return masses.mass();
  }

  // After add_up: the row's sums; `fits`: the first block has received all tokens of the bracket.
  __device__ __forceinline__ BracketShare share(bool& fits) {
    auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (threadIdx.x < 32) {
      const bool has = lane < kWarps;
      const uint64 total = sum_over_warp(has ? row.shared.scratch[lane] : 0);
      const uint64 above = sum_over_warp(has ? row.shared.warp_amount[lane] : 0);
      const uint64 listed = sum_over_warp(has ? search.warp_listed[lane] : 0);
      const auto words = [](uint64 first, uint64 second) {
        return make_uint4(static_cast<unsigned>(first), static_cast<unsigned>(first >> 32), static_cast<unsigned>(second),
                          static_cast<unsigned>(second >> 32));
      };
      uint4* place = reinterpret_cast<uint4*>(&search.sums[row.rank]);
      row.mailbox.send_to_all(kSums, place, words(total, above));
      row.mailbox.send_to_all(kSums, place + 1, words(listed, static_cast<uint64>(search.list_count)));
    }
    row.mailbox.receive(kSums, kBlocks * sizeof(BracketShare));
    const BracketShare theirs = lane < kBlocks ? search.sums[lane % kBlocks] : BracketShare{0, 0, 0, 0};
    const unsigned count = static_cast<unsigned>(theirs.count);
    const unsigned sent = __reduce_add_sync(0xffffffffu, min(count, static_cast<unsigned>(kCapacity)));
    fits = __all_sync(0xffffffffu, count <= kCapacity);
    if (row.rank == 0) row.mailbox.receive(kList, 8 * sent);
    return {sum_over_warp(theirs.total), sum_over_warp(theirs.above), sum_over_warp(theirs.listed), sent};
  }

  // Calls visit(logit, token) for the tokens of the first block's list. Each warp has tokens of block warp % kBlocks only.
  template <class Visit>
  __device__ __forceinline__ void for_each_candidate(Visit visit) const {
    constexpr int kParts = kWarps / kBlocks;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const auto& search = row.shared.search;
    const int block = warp % kBlocks, part = warp / kBlocks;
    if (part >= kParts) return;
    const int count = static_cast<int>(search.sums[block].count);
#pragma unroll 1
    for (int idx = part * 32 + lane; idx < count; idx += kParts * 32) {
      const uint2 entry = search.candidates[block * kCapacity + idx];
      visit(__uint_as_float(entry.x), static_cast<int>(entry.y));
    }
  }

  // By the first block: publishes the token of the list at which the running mass in rank order reaches `wanted`, with the answer
  // to the wish; NaN if too many tokens are alike.
  __device__ __forceinline__ void publish(uint64 wanted) {
    auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    // A bin for each thread.
    unsigned* low = reinterpret_cast<unsigned*>(search.parts[1]);
    unsigned* high = low + kThreads;
    static_assert(2 * 4 * kThreads <= sizeof(search.parts[1]));
    low[threadIdx.x] = high[threadIdx.x] = 0;
    if (threadIdx.x == 0) search.num_ranked = 0;
    __syncthreads();
    const float top = fminf(search.bracket.y, row.largest);
    const float per_unit = top > search.bracket.x ? __fdividef(static_cast<float>(kThreads), top - search.bracket.x) : 0.0f;
    const auto bin_of = [&](float logit) { return min(__float2int_rz((top - logit) * per_unit), kThreads - 1); };
    for_each_candidate([&](float logit, int) {
      const int bin = bin_of(logit);
      const uint2 limbs = mass_limbs(weight_of(row.largest - logit));
      atomicAdd(&low[bin], limbs.x);
      atomicAdd(&high[bin], limbs.y);
    });
    __syncthreads();
    const Prefix<uint64> bins = row.prefix_over_block(join_limbs(make_uint2(low[threadIdx.x], high[threadIdx.x])));
    if (bins.exclusive < wanted && wanted <= bins.inclusive) {
      search.boundary_bin = static_cast<int>(threadIdx.x);
      search.boundary_wanted = wanted - bins.exclusive;
    }
    __syncthreads();
    const int chosen = search.boundary_bin;
    wanted = search.boundary_wanted;
    RankedToken* tokens = ranked_tokens(row.shared);
    for_each_candidate([&](float logit, int token) {
      if (bin_of(logit) != chosen) return;
      const int slot = atomicAdd(&search.num_ranked, 1);
      if (slot < kMaxRanked) tokens[slot] = ranked_token(logit, token, mass_at(row.largest - logit));
    });
    __syncthreads();
    const int count = search.num_ranked;
    if (count > kMaxRanked) {
      if (threadIdx.x < 32) row.mailbox.send_to_all(kFound, &search.found, message({no_logit(), 0}, Answer{}));
      return;
    }
    // Every thread group compares one token with all.
#pragma unroll 1
    for (int base = 0; base < count; base += kComparedTokens) {
      const int place = base + compared_place<kThreads>();
      const bool compares = place < count && compared_place<kThreads>() < kComparedTokens;
      const RankedToken own = compares ? tokens[place] : RankedToken{0, 0};
      int rank;
      const uint64 before = compare_with_all<kThreads>(tokens, count, own, rank);
      if (compares && static_cast<int>(threadIdx.x) % kComparers<kThreads> == 0 && before < wanted &&
          wanted <= before + own.amount) {
        search.own_found = {logit_of(own.rank_key), static_cast<int>(token_of(own.rank_key))};
      }
    }
    __syncthreads();
    const RankPrefix found = search.own_found;
    Answer end;
    if (wish != Wish::kNothing) {
      MassSum kept;
      for_each_candidate([&](float logit, int token) {
        if (found.has(logit, token)) kept.add(weight_of(row.largest - logit));
      });
      const uint64 sum = sum_over_warp(kept.mass());
      if (lane == 0) row.shared.scratch[warp] = sum;
      __syncthreads();
      end = answer_of(wish, kept_of_block(lane));
    }
    if (threadIdx.x < 32) row.mailbox.send_to_all(kFound, &search.found, message(found, end));
  }

  // In the first block, after sums of kept candidates stand in row.shared.scratch: the kept mass of block `block`; 0 past the last.
  __device__ __forceinline__ uint64 kept_of_block(int block) const {
    if (block >= kBlocks) return 0;
    uint64 kept = row.shared.search.sums[block].above;
#pragma unroll 1
    for (int warp = block; warp < kWarps; warp += kBlocks) kept += row.shared.scratch[warp];
    return kept;
  }

  // By a whole warp, each lane with the kept mass of the block of its number.
  __device__ __forceinline__ Answer answer_of(Wish wanted, uint64 kept) const {
    const Prefix<uint64> prefix = prefix_over_lanes<32>(kept);
    if (wanted == Wish::kTotal) return {0, prefix.total};
    const uint64 target = static_cast<uint64>(scale_bits(row.shared.random, static_cast<int64>(prefix.total)));
    const unsigned block = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, target < prefix.inclusive))) - 1;
    return {block, target - __shfl_sync(0xffffffffu, prefix.exclusive, static_cast<int>(block))};
  }

  // Adds the kept tokens of the bracket to the warps' sums of those above it.
  __device__ __forceinline__ void add_kept_to_warps(RankPrefix prefix) {
    MassSum kept;
    for_each_marked([&](float logit, int place) {
      if (prefix.has(logit, row.first_token + place)) kept.add(weight_of(row.largest - logit));
    });
    const uint64 sum = sum_over_warp(kept.mass());
    if (threadIdx.x % 32 == 0) row.shared.warp_amount[threadIdx.x / 32] += sum;
    __syncthreads();
  }
};

}  // namespace fi
