// The last token that top_p keeps, where it is one of many equal ones: more than the lists of bracket_search.cuh hold, of which
// those of the lowest index are kept.
#pragma once

#include "fi/sampling/answer.cuh"

namespace fi {

template <class Config>
struct TiedSearch {
  using Row = ClusterRow<Config>;
  static constexpr int kBlocks = Row::kBlocks, kWarps = Row::kWarps;

  Row& row;
  Wish wish;
  Answer answer = {};

  // Whether the kept mass ends among tokens between the logits search.bracket, and all of these are equal; all blocks agree. `found`
  // then has, of each block, which of its own tokens are kept, and with Wish::kDraw the drawn token's block has in row.shared.warp_amount
  // the kept mass of each warp's tokens. The mass to reach is search.boundary_wanted, or what target_of makes of the tokens' own.
  template <class TargetOf>
  __device__ __forceinline__ bool find(bool has_target, TargetOf target_of, RankPrefix& found) {
    auto& shared = row.shared;
    auto& search = shared.search;
    const float high = search.bracket.y;
    share(search.bracket.x, high);
    // All warps do the same, a lane for each block.
    constexpr int kLanes = lanes_for(kBlocks);
    const unsigned block = threadIdx.x % kLanes;
    const uint4 theirs = block < kBlocks ? search.sums[block] : make_uint4(0, 0, 0, 0);
    const int count = static_cast<int>(theirs.z);
    const float logit = __uint_as_float(theirs.w);  // NaN if they are not equal
    const uint64 above = theirs.x | static_cast<uint64>(theirs.y) << 32;
    const Prefix<int> tokens = prefix_over_lanes<kLanes>(count);
    const uint64 all_above = prefix_over_lanes<kLanes>(above).total;
    const bool alike = __all_sync(0xffffffffu, logit == logit);
    const float tied = largest_of_warp(count > 0 ? logit : minus_infinity());
    const uint64 each = mass_at(row.largest - tied);
    const uint64 target = has_target ? search.boundary_wanted : target_of(each * tokens.total);
    if (!alike || !__all_sync(0xffffffffu, count == 0 || logit == tied) || each == 0 || target <= all_above ||
        target - all_above > each * tokens.total) {
      row.meet();  // all have read the sums
      return false;
    }
    const int number = static_cast<int>((target - all_above + each - 1) / each);
    const int kept = min(max(number - tokens.exclusive, 0), count);
    const int own_kept = __shfl_sync(0xffffffffu, kept, row.rank), own_count = __shfl_sync(0xffffffffu, count, row.rank);
    if (wish != Wish::kNothing) answer = answer_of<kLanes>(wish, above + each * kept, shared.random);
    found = {tied, own_kept == 0 ? -1 : 0x7fffffff};
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const Prefix<uint64> warps = row.prefix_over_warps(shared.scratch);
    if (own_kept > 0 && own_kept < own_count) {
      const int before = static_cast<int>(__shfl_sync(0xffffffffu, warps.exclusive, warp));
      const int own = static_cast<int>(__shfl_sync(0xffffffffu, warps.inclusive, warp)) - before;
      if (before < own_kept && own_kept <= before + own) find_last(tied, own_kept - before);
      __syncthreads();
      found.last = search.own_found.last;
    }
    if (wish == Wish::kDraw && static_cast<int>(answer.block) == row.rank) {
      if (warp == 0 && lane < kWarps) {
        const int in_warp = static_cast<int>(warps.inclusive - warps.exclusive);
        shared.warp_amount[lane] += each * min(max(own_kept - static_cast<int>(warps.exclusive), 0), in_warp);
      }
      __syncthreads();
    }
    return true;
  }

  // Each block's tokens between the logits, in search.sums of all: the mass of those above, their number, and which logit they all have; and
  // of each warp's in warp_amount and `scratch`.
  __device__ __forceinline__ void share(float low, float high) {
    auto& shared = row.shared;
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    MassSumAbove masses;
    int count = 0;
    float smallest = -minus_infinity(), largest = minus_infinity();
    for_each_four<Config, 1>(shared.slice, [&](int, float4 four) {
      const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        masses.add_if_above(MassSum::widen(row.weight(logits[e])), logits[e], high);
        if (logits[e] <= high && logits[e] >= low) {
          ++count;
          smallest = fminf(smallest, logits[e]);
          largest = fmaxf(largest, logits[e]);
        }
      }
    });
    const uint64 above = sum_over_warp(masses.mass());
    count = __reduce_add_sync(0xffffffffu, count);
    smallest = smallest_of_warp(smallest);
    largest = largest_of_warp(largest);
    if (lane == 0) {
      shared.warp_amount[warp] = above;
      shared.scratch[warp] = static_cast<uint64>(count);
      shared.warp_smallest[warp] = smallest;
      shared.warp_largest[warp] = largest;
    }
    __syncthreads();
    if (warp == 0) {
      const uint64 all = sum_over_warp(lane < kWarps ? shared.warp_amount[lane] : 0);
      const unsigned number = __reduce_add_sync(0xffffffffu, lane < kWarps ? static_cast<unsigned>(shared.scratch[lane]) : 0u);
      const float least = smallest_of_warp(shared.warp_smallest[lane % kWarps]);
      const float most = largest_of_warp(shared.warp_largest[lane % kWarps]);
      const float logit = number == 0 ? 0.0f : least == most ? least : not_a_number();
      row.mailbox.send_to_all(kSums, &shared.search.sums[row.rank],
                              make_uint4(static_cast<unsigned>(all), static_cast<unsigned>(all >> 32), number, __float_as_uint(logit)));
    }
    row.mailbox.receive(kSums, kBlocks * 16);
  }

  // By one warp: the token that is number `number`, from 1, in index order of its own of this logit, in search.own_found.
  __device__ __forceinline__ void find_last(float tied, int number) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll 1
    for (int round = 0; round < RowShape<Config>::kRounds && number > 0; ++round) {
      const int place = place_of_round<Config>(round);
      const float4 four = four_behind<Config>(row.shared.slice, place);
      const float logits[4] = {four.x, four.y, four.z, four.w};
      int mine = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) mine += logits[e] == tied ? 1 : 0;
      const Prefix<int> prefix = prefix_over_lanes<32>(mine);
      if (prefix.exclusive < number && number <= prefix.inclusive) {
        int left = number - prefix.exclusive;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (logits[e] == tied && --left == 0) row.shared.search.own_found.last = row.first_token + place + e;
        }
      }
      number -= prefix.total;
    }
  }
};

}  // namespace fi
