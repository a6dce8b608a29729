// The last token that top_p keeps of a whole row, in two passes over the slice.
//
// The first counts tokens in 64 bins of equal width in the logit, and adds up their places in these. A bin's count times the weight
// at the mean place says, to within some hundred tokens, where in the rank order the kept mass ends; a bracket of logits holds kMargin tokens on each side. The
// second pass sums up exact masses, of all tokens and of those above the bracket, and each block keeps a list of its tokens in it.
// Masses of 64 bins of these then lead to a few dozen tokens, which every block gets and compares. The estimate decides nothing:
// if the bracket proves not to hold the end, or too many tokens are alike, PrefixSearch takes over.
#pragma once

#include "fi/sampling/answer.cuh"
#include "fi/sampling/rank_scale.cuh"
#include "fi/sampling/ranked_tokens.cuh"

namespace fi {

template <class Config>
struct BracketSearch {
  using Row = ClusterRow<Config>;
  using Shared = SearchShared<Config>;
  static constexpr int kBlocks = Row::kBlocks, kThreads = Row::kThreads, kWarps = Row::kWarps;
  static constexpr int kRounds = RowShape<Config>::kRounds;
  static constexpr int kRoundsPerWord = 8;  // a bit for each of 4 tokens
  static constexpr int kWords = (kRounds + kRoundsPerWord - 1) / kRoundsPerWord;
  static constexpr int kMargin = kBlocks == 1 ? 170 : 300;
  static constexpr int kCountShift = 51;  // in sums: up to 2^19 tokens weigh no more than 2^51
  static constexpr int kBinCountShift = 48;
  static constexpr unsigned kOneToken = 1u << 18;
  static_assert(kBlocks <= kWarps && RowShape<Config>::kBlockTokens <= 32 * 1024 && 3 * kMargin <= kBlocks * Shared::kBracketTokens);

  Row& row;
  Wish wish;
  Answer answer = {};

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
    const Bins bins(row.largest, search.bracket);
    share(bins);
    if (threadIdx.x < 32) locate_bin(target_of);
    __syncthreads();
    const int bin = search.boundary_bin;
    if (bin < 0) {
      // Every block has read the sums before others may be sent.
      row.meet();
      return false;
    }
    if (wish != Wish::kNothing) sum_before(bin);
    send_tokens(bins, bin);
    row.mailbox.receive(kList, sizeof(RankedToken) * static_cast<unsigned>(search.num_ranked));
    compare();
    found = search.own_found;
    if (wish != Wish::kNothing) {
      if (threadIdx.x < 32) settle();
      __syncthreads();
      read_message(search.found, answer);
      if (wish == Wish::kDraw && static_cast<int>(answer.block) == row.rank) add_kept_to_warps(found);
    }
    return true;
  }

  // From which logit on tokens have mass, or are. Whole warps; read again, the smallest logit needs no register in between.
  __device__ __forceinline__ float bottom() const {
    const float smallest = smallest_of_warp(__uint_as_float(row.shared.extremes[threadIdx.x % kBlocks].y));
    return fmaxf(row.largest - kMasslessShortfall, smallest);
  }

  // Of each bin the number of the row's tokens and their mean place in it, of every block, in search.count_parts: the upper and the
  // lower 16 bits. The bin of the largest logits is first; places are from 0 at a bin's lower end.
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
        // From 0 at the bottom, also for NaN, to 1. In a float of 2^16 + 2^11, bins are multiples of 2^7, a bin's bytes; below is the
        // place in the bin, in 128ths, and above, of 2^11, the bit that counts. A column has no more than 2^10 tokens.
        const float place = __saturatef(fmaf(logits[e], per_unit, offset));
        const unsigned bin = __float_as_uint(fmaf(place, kRankBins - 0.0078125f, 65536.0f + 2048.0f));
        atomicAdd(reinterpret_cast<unsigned*>(column + (bin & ((kRankBins - 1) * 128))), bin & (kOneToken | 127));
      }
    });
    __syncthreads();
    unsigned* own = reinterpret_cast<unsigned*>(search.own_bins);
#pragma unroll 2
    for (int bin = warp; bin < kRankBins; bin += kWarps) {
      const unsigned column = search.counts[bin][lane];
      const unsigned number = __reduce_add_sync(0xffffffffu, column / kOneToken);
      const unsigned places = __reduce_add_sync(0xffffffffu, column % kOneToken);
      // The mean place, in 2^16ths.
      const float mean = __fdividef(static_cast<float>(places) * 512.0f, fmaxf(static_cast<float>(number), 1.0f));
      if (lane == 0) own[kRankBins - 1 - bin] = number << 16 | static_cast<unsigned>(mean);
    }
    __syncthreads();
    uint4* parts = reinterpret_cast<uint4*>(search.count_parts[row.rank]);
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
    int numbers[2] = {0, 0};
    uint64 places[2] = {0, 0};
#pragma unroll 4
    for (int block = 0; block < kBlocks; ++block) {
      const uint2 two = *reinterpret_cast<const uint2*>(&search.count_parts[block][2 * lane]);
      numbers[0] += static_cast<int>(two.x >> 16);
      numbers[1] += static_cast<int>(two.y >> 16);
      places[0] += static_cast<uint64>(two.x >> 16) * (two.x & 0xffff);
      places[1] += static_cast<uint64>(two.y >> 16) * (two.y & 0xffff);
    }
    // Places of the slices without a token stand at the lower end of the last bin.
    if (lane == 31) numbers[1] -= kBlocks * kWarps * kRounds * 128 - row.vocab_size;
    const float width = (row.largest - bottom) / kRankBins;
    float mean[2], weight[2];  // of a bin's tokens: how far below its upper end, in its width, and what they weigh
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float number = static_cast<float>(numbers[half]);
      const float place = __fdividef(static_cast<float>(places[half]), fmaxf(number, 1.0f) * 65536.0f);
      mean[half] = numbers[half] > 0 ? 1.0f - 1.0f / 256 - place : 0.5f;
      // Spread tokens weigh a little more than as many at the mean.
      const float spread = numbers[half] >= 8 ? fmaf(width * width, 1.0f / 24, 1.0f) : 1.0f;
      weight[half] = number * spread * weight_of((static_cast<float>(2 * lane + half) + mean[half]) * width);
    }
    const Prefix<int> tokens = prefix_over_lanes<32>(numbers[0] + numbers[1]);
    const Prefix<float> weights = prefix_over_lanes<32>(weight[0] + weight[1]);
    const float wanted = fraction * weights.total;
    const auto portion = [](float part, float whole) {
      return fminf(fmaxf(__fdividef(part, fmaxf(whole, 1e-30f)), 0.0f), 1.0f);
    };
    const auto first_lane = [](bool reached) {
      const int lanes = static_cast<int>(__ballot_sync(0xffffffffu, reached));
      return lanes != 0 ? __ffs(lanes) - 1 : 31;
    };
    // After how many tokens the running weight reaches it. A bin's first tokens weigh more than its last ones.
    const bool later = wanted > weights.exclusive + weight[0];
    float part = portion(wanted - weights.exclusive - (later ? weight[0] : 0.0f), later ? weight[1] : weight[0]);
    part -= 0.5f * width * part * (1.0f - part);
    float middle = static_cast<float>(tokens.exclusive + (later ? numbers[0] : 0)) +
                   part * static_cast<float>(later ? numbers[1] : numbers[0]);
    middle = __shfl_sync(0xffffffffu, middle, first_lane(wanted <= weights.inclusive));
    // The logit after `place` tokens: of a density that is linear within a bin, as the mean place has it.
    const auto edge = [&](float place) {
      const bool in_second = place >= static_cast<float>(tokens.exclusive + numbers[0]);
      const float passed = static_cast<float>(tokens.exclusive + (in_second ? numbers[0] : 0));
      float part = portion(place - passed, static_cast<float>(in_second ? numbers[1] : numbers[0]));
      const float slope = fminf(fmaxf(6.0f * (in_second ? mean[1] : mean[0]) - 3.0f, -1.0f), 1.0f);
      part += slope * part * (1.0f - part);
      const float logit = row.largest - (static_cast<float>(2 * lane + in_second) + part) * width;
      return __shfl_sync(0xffffffffu, logit, first_lane(place < static_cast<float>(tokens.inclusive)));
    };
    float low = edge(middle + kMargin), high = edge(fmaxf(middle - kMargin, 0.0f));
    if (middle + kMargin >= static_cast<float>(tokens.total)) low = bottom;
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

  // The second pass: sums of the warps in row.shared, tokens from `low` up to `high` on this block's list.
  __device__ __forceinline__ void add_up(float low, float high) {
    clear_bins();
    MassSum total;
    MassSumAbove above;
    unsigned hits[kWords];  // this thread's tokens in the bracket
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      unsigned marked = 0;
#pragma unroll 2
      for (int round = word * kRoundsPerWord; round < end_of(word); ++round) {
        const float4 four = four_at<Config>(row.shared.slice, place_of_round<Config>(round));
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
    list(hits);
    const uint64 all = sum_over_warp(total.mass()), before = sum_over_warp(above.mass());
    if (threadIdx.x % 32 == 0) {
      const int warp = static_cast<int>(threadIdx.x) / 32;
      row.shared.scratch[warp] = all;
      row.shared.warp_amount[warp] = before;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void list(const unsigned (&hits)[kWords]) const {
    auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    int mine = 0;
#pragma unroll
    for (int word = 0; word < kWords; ++word) mine += __popc(hits[word]);
    if (mine == 0) return;
    int slot = atomicAdd(&search.list_count, mine);
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
#pragma unroll 1
      for (unsigned left = hits[word]; left != 0; left &= left - 1) {
        const int bit = __ffs(static_cast<int>(left)) - 1;
        const int round = end_of(word) - 1 - bit / 4;
        const int place = warp * RowShape<Config>::kWarpTokens + (round * 32 + lane) * 4 + bit % 4;
        if (slot < Shared::kBracketTokens) {
          const unsigned token = static_cast<unsigned>(row.first_token + place);
          search.bracket_tokens[slot] = make_uint2(__float_as_uint(row.shared.slice[place]), token);
        }
        ++slot;
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

    __device__ __forceinline__ Bins(float largest, float2 bracket) : top(fminf(bracket.y, largest)) {
      per_unit = top > bracket.x ? __fdividef(static_cast<float>(kRankBins), top - bracket.x) : 0.0f;
    }
    __device__ __forceinline__ int of(float logit) const { return min(__float2int_rz((top - logit) * per_unit), kRankBins - 1); }
  };

  __device__ __forceinline__ void clear_bins() const {
    unsigned* bins = &row.shared.search.bracket_bins[0][0];
#pragma unroll 1
    for (int idx = static_cast<int>(threadIdx.x); idx < 3 * kRankBins; idx += kThreads) bins[idx] = 0;
  }

  // After add_up: sums and histograms of all blocks in search.sums and search.bracket_parts.
  __device__ __forceinline__ void share(const Bins& bins) {
    auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    for_each_listed([&](float logit, int) {
      const int bin = bins.of(logit);
      const uint2 limbs = mass_limbs(weight_of(row.largest - logit));
      atomicAdd(&search.bracket_bins[0][bin], limbs.x);
      atomicAdd(&search.bracket_bins[1][bin], limbs.y);
      atomicAdd(&search.bracket_bins[2][bin], 1u);
    });
    if (warp == 0) {
      const uint64 total = sum_over_warp(lane < kWarps ? row.shared.scratch[lane] : 0);
      const uint64 above = sum_over_warp(lane < kWarps ? row.shared.warp_amount[lane] : 0);
      const uint64 count = static_cast<uint64>(min(search.list_count, Shared::kBracketTokens + 1));
      const uint64 packed = total | count << kCountShift;
      const uint4 sums = make_uint4(static_cast<unsigned>(packed), static_cast<unsigned>(packed >> 32),
                                    static_cast<unsigned>(above), static_cast<unsigned>(above >> 32));
      row.mailbox.send_to_all(kSums, &search.sums[row.rank], sums);
    }
    __syncthreads();
    if (warp < kBlocks) {
      // Each sending warp joins the limbs anew: no barrier.
      uint64 packed[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int bin = 2 * lane + half;
        packed[half] = join_limbs(make_uint2(search.bracket_bins[0][bin], search.bracket_bins[1][bin])) |
                       static_cast<uint64>(search.bracket_bins[2][bin]) << kBinCountShift;
      }
      row.mailbox.send(kSums, static_cast<unsigned>(warp), reinterpret_cast<uint4*>(search.bracket_parts[row.rank]) + lane,
                       make_uint4(static_cast<unsigned>(packed[0]), static_cast<unsigned>(packed[0] >> 32),
                                  static_cast<unsigned>(packed[1]), static_cast<unsigned>(packed[1] >> 32)));
    }
    row.mailbox.receive(kSums, kBlocks * (16 + 8 * kRankBins));
  }

  // By the first warp, after share: the bin in which the kept mass ends, -1 if it is not in the bracket or cannot be decided here;
  // how many tokens are in it, and of the blocks before this one.
  template <class TargetOf>
  __device__ __forceinline__ void locate_bin(TargetOf target_of) {
    auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x);
    constexpr uint64 kMasses = (1ull << kCountShift) - 1, kBinMasses = (1ull << kBinCountShift) - 1;
    const uint4 sums = lane < kBlocks ? search.sums[lane % kBlocks] : make_uint4(0, 0, 0, 0);
    const uint64 packed = sums.x | static_cast<uint64>(sums.y) << 32;
    const uint64 target = target_of(sum_over_warp(packed & kMasses));
    const uint64 above = sum_over_warp(sums.z | static_cast<uint64>(sums.w) << 32);
    const bool listed = __all_sync(0xffffffffu, packed >> kCountShift <= Shared::kBracketTokens);
    uint64 first = 0, second = 0;
#pragma unroll 4
    for (int block = 0; block < kBlocks; ++block) {
      const ulonglong2 two = *reinterpret_cast<const ulonglong2*>(&search.bracket_parts[block][2 * lane]);
      first += two.x;
      second += two.y;
    }
    const Prefix<uint64> prefix = prefix_over_lanes<32>((first & kBinMasses) + (second & kBinMasses));
    const uint64 wanted = target - above;  // if target is larger
    const bool here = listed && target > above && prefix.exclusive < wanted && wanted <= prefix.inclusive;
    const bool in_first = wanted <= prefix.exclusive + (first & kBinMasses);
    const unsigned lanes = __ballot_sync(0xffffffffu, here);
    const int holder = lanes != 0 ? __ffs(static_cast<int>(lanes)) - 1 : 0;
    const int bin = 2 * holder + __shfl_sync(0xffffffffu, in_first ? 0 : 1, holder);
    const int count = lane < kBlocks ? static_cast<int>(search.bracket_parts[lane % kBlocks][bin] >> kBinCountShift) : 0;
    const int all = __reduce_add_sync(0xffffffffu, count);
    const int before = __reduce_add_sync(0xffffffffu, lane < row.rank ? count : 0);
    if (lane == holder) {
      search.boundary_bin = lanes != 0 && all <= kComparedTokens ? bin : -1;
      search.boundary_wanted = wanted - prefix.exclusive - (in_first ? 0 : first & kBinMasses);
      search.num_ranked = all;
      search.list_before = before;
    }
    if (lane < kBlocks) search.kept[0][lane] = search.kept[1][lane] = 0;
  }

  // The mass of each block's tokens before the boundary.
  __device__ __forceinline__ void sum_before(int boundary) const {
    auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    if (warp >= kBlocks) return;
    uint64 sum = 0;
#pragma unroll
    for (int bin = lane; bin < kRankBins; bin += 32) {
      if (bin < boundary) sum += search.bracket_parts[warp][bin] & ((1ull << kBinCountShift) - 1);
    }
    sum = sum_over_warp(sum);
    const uint4 sums = search.sums[warp];
    if (lane == 0) search.above[warp] = sum + (sums.z | static_cast<uint64>(sums.w) << 32);
  }

  // This block's tokens in the bin to all blocks.
  __device__ __forceinline__ void send_tokens(const Bins& bins, int chosen) {
    auto& search = row.shared.search;
    for_each_listed([&](float logit, int token) {
      if (bins.of(logit) != chosen) return;
      const RankedToken ranked = ranked_token(logit, token, mass_at(row.largest - logit));
      const uint4 words = make_uint4(static_cast<unsigned>(ranked.rank_key), static_cast<unsigned>(ranked.rank_key >> 32),
                                     static_cast<unsigned>(ranked.amount), static_cast<unsigned>(ranked.amount >> 32));
      uint4* place = reinterpret_cast<uint4*>(&search.boundary[atomicAdd(&search.list_before, 1)]);
#pragma unroll 1
      for (unsigned block = 0; block < kBlocks; ++block) row.mailbox.send(kList, block, place, words);
    });
  }

  // The last kept token, in search.own_found, and what each block's tokens of the bin add to the kept mass.
  __device__ __forceinline__ void compare() {
    auto& search = row.shared.search;
    const int count = search.num_ranked;
    const uint64 wanted = search.boundary_wanted;
    const int place = compared_place<kThreads>();
    if (static_cast<int>(threadIdx.x) / 32 * 32 / kComparers<kThreads> < count) {  // whole warps
      const bool leads = place < count && static_cast<int>(threadIdx.x) % kComparers<kThreads> == 0;
      const RankedToken own = place < count ? search.boundary[place] : RankedToken{0, 0};
      int rank;
      const uint64 before = compare_with_all<kThreads>(search.boundary, count, own, rank);
      if (leads && before < wanted) {
        const int token = static_cast<int>(token_of(own.rank_key));
        const int block = token / RowShape<Config>::kBlockTokens;
        atomicAdd(&search.kept[0][block], static_cast<unsigned>(own.amount) & 0xffffu);
        atomicAdd(&search.kept[1][block], static_cast<unsigned>(own.amount >> 16));
        if (wanted <= before + own.amount) search.own_found = {logit_of(own.rank_key), token};
      }
    }
    __syncthreads();
  }

  // By the first warp, after compare: the answer, in search.found.
  __device__ __forceinline__ void settle() {
    auto& search = row.shared.search;
    const unsigned lane = threadIdx.x;
    uint64 kept = 0;
    if (lane < kBlocks) kept = search.above[lane] + search.kept[0][lane] + (static_cast<uint64>(search.kept[1][lane]) << 16);
    const Answer end = answer_of(wish, kept, row.shared.random);
    if (lane == 0) search.found = message(search.own_found, end);
  }

  // Adds the kept tokens of the bracket to the warps' sums of those above it.
  __device__ __forceinline__ void add_kept_to_warps(RankPrefix prefix) {
    auto& search = row.shared.search;
    clear_bins();
    __syncthreads();
    for_each_listed([&](float logit, int token) {
      if (!prefix.has(logit, token)) return;
      const int warp = (token - row.first_token) / RowShape<Config>::kWarpTokens;
      const uint2 limbs = mass_limbs(weight_of(row.largest - logit));
      atomicAdd(&search.bracket_bins[0][warp], limbs.x);
      atomicAdd(&search.bracket_bins[1][warp], limbs.y);
    });
    __syncthreads();
    const int warp = static_cast<int>(threadIdx.x);
    if (warp < kWarps) {
      row.shared.warp_amount[warp] += join_limbs(make_uint2(search.bracket_bins[0][warp], search.bracket_bins[1][warp]));
    }
    __syncthreads();
  }
};

}  // namespace fi
