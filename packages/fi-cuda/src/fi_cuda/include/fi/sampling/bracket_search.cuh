// The last token that top_p, or typical_p (typical_set.cuh), keeps of a whole row, in two passes over the slice.
//
// The first (bracket_estimate.cuh) says about where in the rank order the kept mass ends; a bracket of values holds kMargin tokens
// on each side. The second pass sums up exact masses, of all tokens and of those above the bracket, and each block keeps a list of its tokens in it.
// Masses of 64 bins of these then lead to a few dozen tokens, which every block gets and compares. The estimate decides nothing:
// if the bracket proves not to hold the end, or too many tokens are alike, PrefixSearch takes over.
#pragma once

#include "fi/sampling/bracket_estimate.cuh"
#include "fi/sampling/bracket_list.cuh"
#include "fi/sampling/ranked_tokens.cuh"

namespace fi {

template <class Config, class Order = ByLogit>
struct BracketSearch : BracketList<Config, Order> {
  using List = BracketList<Config, Order>;
  using typename List::Bins;
  using typename List::Row;
  using typename List::Shared;
  using List::end_of, List::find_tied, List::for_each_listed, List::kBinCountShift, List::kBlocks, List::kRounds, List::kRoundsPerWord,
      List::kThreads, List::kWarps, List::kWords, List::list, List::order, List::row;
  static constexpr int kMargin = kBlocks == 1 ? 170 : 300;
  static constexpr int kCountShift = 51;  // in sums: up to 2^19 tokens weigh no more than 2^51
  static_assert(kBlocks <= kWarps && 3 * kMargin <= kBlocks * Shared::kBracketTokens);

  Wish wish;
  Answer answer = {};

  // With an estimate in search.bracket. target_of(total mass), at least 1 and at most that, is to be reached. False, in all blocks, if another search must do it, and then `found` is as it was.
  // With Wish::kDraw the drawn token's block also has, in row.shared.warp_amount, the kept mass of each warp's tokens.
  template <class TargetOf>
  __device__ __forceinline__ bool find(TargetOf target_of, RankPrefix& found) {
    auto& search = row.shared.search;
    add_up(search.bracket.x, search.bracket.y);
    const Bins bins(order.top(), search.bracket);
    share(bins);
    if (threadIdx.x < 32) locate_bin(target_of);
    __syncthreads();
    const int bin = search.boundary_bin, count = search.num_ranked;
    if (bin >= 0 && wish != Wish::kNothing) sum_before(bin);
    if (bin < 0) {
      // Every block has read the sums before others may be sent.
      row.meet();
      return false;
    }
    if (wish == Wish::kDraw) clear_bins();  // for add_kept_to_warps
    // Many tokens in one bin are equal as a rule. Where they are not, all blocks have met: the same messages may follow.
    const bool tied = count > 32 && find_tied(bins, bin);
    if (!tied && count > kComparedTokens) return false;
    if (!tied) {
      send_tokens(bins, bin);
      __syncthreads();
      row.mailbox.receive_in_first_warp(kList, sizeof(RankedToken) * static_cast<unsigned>(count));
      if (count <= 32) {
        if (threadIdx.x < 32) compare<32>();  // and settle after it: no barriers
        __syncwarp();
      } else {
        __syncthreads();
        compare<kThreads>();
        __syncthreads();
      }
    }
    if (wish != Wish::kNothing && threadIdx.x < 32) settle();
    __syncthreads();
    found = search.own_found;
    if (wish != Wish::kNothing) {
      read_message(search.found, answer);
      if (wish == Wish::kDraw && static_cast<int>(answer.block) == row.rank) add_kept_to_warps(found);
    }
    return true;
  }

  // The second pass: sums of the warps in row.shared, tokens of values from `low` up to `high` on this block's list.
  __device__ __forceinline__ void add_up(float low, float high) {
    clear_bins();
    MassSum total;
    MassSumAbove above;
    unsigned hits[kWords];  // this thread's fours of which one may be in the bracket
    const Marks marks = order.marks(low, high);
    const float* mine = row.shared.slice + place_of_full_round<Config>(0);
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      unsigned marked = 0;
      const auto visit = [&](float4 four) {
        unsigned nearest = 0xffffffffu;
        const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float shortfall = row.largest - logits[e], value = order.value(logits[e]);
          const double weight = MassSum::widen(row.weight_at(shortfall));
          total.add(weight);
          above.add_if_above(weight, value, high);
          nearest = min(nearest, __float_as_uint(order.place(shortfall, value)) - marks.first);
        }
        marked = 2 * marked + (nearest <= marks.width ? 1u : 0u);
      };
      constexpr int kFull = RowShape<Config>::kFullRounds;
#pragma unroll 5
      for (int round = word * kRoundsPerWord; round < min(end_of(word), kFull); ++round) {
        visit(reinterpret_cast<const float4*>(mine)[round * 32]);
      }
      if (end_of(word) > kFull) visit(four_behind<Config>(row.shared.slice, place_of_partial_round<Config>()));
      hits[word] = marked;
    }
    list(hits, low, high);
    const uint64 all = sum_over_warp(total.mass()), before = sum_over_warp(above.mass());
    if (threadIdx.x % 32 == 0) {
      const int warp = static_cast<int>(threadIdx.x / 32);
      row.shared.scratch[warp] = all;
      row.shared.warp_amount[warp] = before;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void clear_bins() const {
    unsigned* bins = &row.shared.search.bracket_bins[0][0];
#pragma unroll 1
    for (int idx = static_cast<int>(threadIdx.x); idx < 3 * kRankBins; idx += kThreads) bins[idx] = 0;
  }

  // After add_up: sums and histograms of all blocks in search.sums and search.bracket_parts, for the first warp, and after the next
  // barrier for all.
  __device__ __forceinline__ void share(const Bins& bins) {
    auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    for_each_listed([&](float logit, int) {
      const int bin = bins.of(order.value(logit));
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
    row.mailbox.receive_in_first_warp(kSums, kBlocks * (16 + 8 * kRankBins));
  }

  // By the first warp, after share: the bin in which the kept mass ends, -1 if it is not in the bracket, and then boundary_wanted is the target; how many tokens are in it, and of the blocks before this one.
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
      search.boundary_bin = lanes != 0 ? bin : -1;
      search.boundary_wanted = lanes != 0 ? wanted - prefix.exclusive - (in_first ? 0 : first & kBinMasses) : target;
      search.num_ranked = all;
      search.list_before = before;
    }
    if (lane < kBlocks) search.kept[0][lane] = search.kept[1][lane] = 0;
  }

  // The mass of each block's tokens before the boundary.
  __device__ __forceinline__ void sum_before(int boundary) const {
    auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
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
      const float value = order.value(logit);
      if (bins.of(value) != chosen) return;
      const RankedToken ranked = ranked_token(value, token, mass_at(row.largest - logit));
      const uint4 words = make_uint4(static_cast<unsigned>(ranked.rank_key), static_cast<unsigned>(ranked.rank_key >> 32),
                                     static_cast<unsigned>(ranked.amount), static_cast<unsigned>(ranked.amount >> 32));
      uint4* place = reinterpret_cast<uint4*>(&search.boundary[atomicAdd(&search.list_before, 1)]);
#pragma unroll 1
      for (unsigned block = 0; block < kBlocks; ++block) row.mailbox.send(kList, block, place, words);
    });
  }

  // The last kept token, in search.own_found, and what each block's tokens of the bin add to the kept mass: by the first kWorkers
  // threads, of up to 32 or kComparedTokens tokens.
  template <int kWorkers>
  __device__ __forceinline__ void compare() {
    auto& search = row.shared.search;
    const int count = search.num_ranked;
    const uint64 wanted = search.boundary_wanted;
    const int place = compared_place<kWorkers>();
    if (static_cast<int>(threadIdx.x / 32) * 32 / kComparers<kWorkers> < count) {  // whole warps
      const bool leads = place < count && threadIdx.x % kComparers<kWorkers> == 0;
      const RankedToken own = place < count ? search.boundary[place] : RankedToken{0, 0};
      int rank;
      const uint64 before = compare_with_all<kWorkers>(search.boundary, count, own, rank);
      if (leads && before < wanted) {
        const int token = static_cast<int>(token_of(own.rank_key));
        const int block = token / RowShape<Config>::kBlockTokens;
        atomicAdd(&search.kept[0][block], static_cast<unsigned>(own.amount) & 0xffffu);
        atomicAdd(&search.kept[1][block], static_cast<unsigned>(own.amount >> 16));
        if (wanted <= before + own.amount) search.own_found = {logit_of(own.rank_key), token};
      }
    }
  }

  // By the first warp, after compare: the answer, in search.found.
  __device__ __forceinline__ void settle() {
    auto& search = row.shared.search;
    constexpr int kLanes = lanes_for(kBlocks);
    const unsigned block = threadIdx.x % kLanes;
    uint64 kept = 0;
    if (block < kBlocks) kept = search.above[block] + search.kept[0][block] + (static_cast<uint64>(search.kept[1][block]) << 16);
    const Answer end = answer_of<kLanes>(wish, kept, row.shared.random);
    if (threadIdx.x == 0) search.found = message(search.own_found, end);
  }

  // Adds the kept tokens of the bracket to the warps' sums of those above it.
  __device__ __forceinline__ void add_kept_to_warps(RankPrefix prefix) {
    auto& search = row.shared.search;
    for_each_listed([&](float logit, int token) {
      if (!prefix.has(order.value(logit), token)) return;
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
