// The shortest prefix of a row's rank order whose count or mass reaches a target, without sorting.
//
// A level sums up the amounts in 64 bins between the largest and the smallest logit in question, exactly, in integers; the bin
// at which the running sum reaches the target holds the prefix's last token. Two levels of bins of equal width leave a few dozen
// tokens, which the first block collects and compares with each other. Where more are left, levels between their extremes
// follow, in the bits of the floats; where all are equal, the last one is found by counting in index order. Bins are monotone in
// the logit, so no rounding changes the result, and the work hardly depends on the distribution.
#pragma once

#include "fi/sampling/answer.cuh"
#include "fi/sampling/rank_scale.cuh"
#include "fi/sampling/ranked_tokens.cuh"

namespace fi {

template <class Config>
struct PrefixSearch {
  using Row = ClusterRow<Config>;
  using Shared = SearchShared<Config>;
  static constexpr int kBlocks = Row::kBlocks, kThreads = Row::kThreads, kWarps = Row::kWarps;
  static constexpr int kColumns = Shared::kColumns, kListPerBlock = Shared::kListPerBlock;
  static constexpr int kLocalTokens = Shared::kLocalTokens;

  Row& row;
  RankPrefix considered;  // only these tokens are weighed
  bool by_count;          // each as 1, else by its mass
  Wish wish;
  Answer answer = {};

  __device__ __forceinline__ uint64 amount_of(float logit) const { return by_count ? 1 : mass_at(row.largest - logit); }

  __device__ __forceinline__ void clear() {
    auto& columns = row.shared.search.columns;
#pragma unroll 1
    for (int idx = static_cast<int>(threadIdx.x); idx < 2 * kRankBins * kColumns / 4; idx += kThreads) {
      reinterpret_cast<uint4*>(columns)[idx] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
  }

  // The first level, over the whole slice.
  __device__ __forceinline__ void add_slice(const RankScale& scale) {
    auto& columns = row.shared.search.columns;
    constexpr int kBinBytes = sizeof(columns[0][0]);
    unsigned char* low = reinterpret_cast<unsigned char*>(columns[0]);
    unsigned char* high = reinterpret_cast<unsigned char*>(columns[1]);
    const unsigned lane_bytes = threadIdx.x % kColumns * 4;
    // Adding this, rounded down, leaves multiples of 1 / kBinBytes: the whole part times a bin's bytes is in place. NaN and what lies
    // further off go to the last bin.
    constexpr float kWhole = 8388608.0f / kBinBytes;
    const auto offset = [&](float shortfall) {
      const float bin = __fadd_rd(fminf(shortfall * scale.per_unit, kRankBins - 1), kWhole);
      return (__float_as_uint(bin) & ((kRankBins - 1) * kBinBytes)) | lane_bytes;
    };
    const auto add = [&](float shortfall, uint2 limbs) {
      const unsigned at = offset(shortfall);
      atomicAdd(reinterpret_cast<unsigned*>(low + at), limbs.x);
      atomicAdd(reinterpret_cast<unsigned*>(high + at), limbs.y);
    };
    if (!by_count && !(considered.value > minus_infinity())) {
      // Without a branch: tokens without mass add nothing.
      for_each_four<Config, 1>(row.shared.slice, [&](int, float4 four) {
        const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float shortfall = scale.top - logits[e];
          add(shortfall, mass_limbs(weight_of(shortfall)));
        }
      });
    } else {
      visit_slice(scale, [&](float logit, int) {
        const float shortfall = scale.top - logit;
        add(shortfall, by_count ? make_uint2(1, 0) : mass_limbs(weight_of(shortfall)));
      });
    }
  }

  // Calls visit(logit, token) for the tokens in the chosen bin that are weighed, from the local list if it has them all.
  template <class Visit>
  __device__ __forceinline__ void for_each_chosen(const RankScale& scale, Visit visit) {
    auto& search = row.shared.search;
    const int count = search.local_count;
    if (count <= kLocalTokens) {
#pragma unroll 1
      for (int idx = static_cast<int>(threadIdx.x); idx < count; idx += kThreads) {
        const uint2 entry = search.local[idx];
        const float logit = __uint_as_float(entry.x);
        if (scale.covers(logit)) visit(logit, static_cast<int>(entry.y));
      }
    } else {
      visit_slice(scale, visit);
    }
  }

  // The same from the slice, one place after the other.
  template <class Visit>
  __device__ __forceinline__ void visit_slice(const RankScale& scale, Visit visit) {
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int first = warp * RowShape<Config>::kWarpTokens;
#pragma unroll 1
    for (int place = first + lane; place < first + RowShape<Config>::kWarpTokens; place += 32) {
      const float logit = row.shared.slice[place];
      const int token = row.first_token + place;
      if (scale.covers(logit) && considered.has(logit, token)) visit(logit, token);
    }
  }

  // Fills the local list with the tokens of bin `outer` of the first level.
  __device__ __forceinline__ void gather_chosen(const RankScale& scale) {
    auto& search = row.shared.search;
    if constexpr (kLocalTokens == 0) {
      if (threadIdx.x == 0) search.local_count = 1;  // does not fit
      __syncthreads();
      return;
    }
    // Their places are from low up to high; the last bin has no end.
    const float low = static_cast<float>(scale.outer);
    const float high = scale.outer < kRankBins - 1 ? low + 1.0f : not_a_number();
    for_each_four<Config, 1>(row.shared.slice, [&](int place, float4 four) {
      const auto near = [&](float logit) {
        const float at = (scale.top - logit) * scale.per_unit;
        return at >= low && !(at >= high);
      };
      const bool any = near(four.x) || near(four.y) || near(four.z) || near(four.w);
      if (any) {
#pragma unroll 1
        for (int e = 0; e < 4; ++e) {
          const float logit = row.shared.slice[place + e];
          const int token = row.first_token + place + e;
          if (near(logit) && logit >= scale.bottom && considered.has(logit, token)) {
            const int slot = atomicAdd(&search.local_count, 1);
            if (slot < kLocalTokens) search.local[slot] = make_uint2(__float_as_uint(logit), static_cast<unsigned>(token));
          }
        }
      }
    });
    __syncthreads();
  }

  __device__ __forceinline__ void add_chosen(const RankScale& scale) {
    auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x % kColumns);
    for_each_chosen(scale, [&](float logit, int) {
      const int bin = scale.bin(logit);
      const uint2 limbs = by_count ? make_uint2(1, 0) : mass_limbs(weight_of(row.largest - logit));
      atomicAdd(&search.columns[0][bin][lane], limbs.x);
      atomicAdd(&search.columns[1][bin][lane], limbs.y);
    });
  }

  __device__ __forceinline__ uint64* parts_of(const RankScale& scale) const {
    return row.shared.search.parts[Shared::kHistograms == 1 || scale.outer < 0 ? 0 : 1];
  }

  // Every block's histogram from the columns into search.parts of all blocks; leaves the columns clear.
  __device__ __forceinline__ void share_bins(const RankScale& scale) {
    auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    __syncthreads();
    uint64* parts = parts_of(scale);
    const Message kind = scale.outer < 0 ? kParts : kPartsAgain;
#pragma unroll 1
    for (int bin = warp; bin < kRankBins; bin += kWarps) {
      const auto taken = [&](unsigned& amount) {
        const unsigned mine = lane < kColumns ? amount : 0;
        if (lane < kColumns) amount = 0;
        return __reduce_add_sync(0xffffffffu, mine);
      };
      const unsigned low = taken(search.columns[0][bin][lane % kColumns]);
      const unsigned high = taken(search.columns[1][bin][lane % kColumns]);
      if (lane == 0) search.own_bins[bin] = low + (static_cast<uint64>(high) << 16);
    }
    __syncthreads();
    // A warp's stores go to one block, side by side: scattered ones take several times as long.
#pragma unroll 1
    for (int block = warp; block < kBlocks; block += kWarps) {
      row.mailbox.send(kind, static_cast<unsigned>(block), reinterpret_cast<uint4*>(&parts[row.rank * kRankBins]) + lane,
                       reinterpret_cast<const uint4*>(search.own_bins)[lane]);
    }
    row.mailbox.receive(kind, kBlocks * kRankBins * 8);
  }

  // After share_bins: the bin at which the running sum over the row reaches what is wanted of it (target_of(total)), and in
  // `wanted` what it lacks before that bin; -1 if all bins do not reach it.
  template <class TargetOf>
  __device__ __forceinline__ int boundary_bin(const RankScale& scale, TargetOf target_of, uint64& wanted) {
    auto& search = row.shared.search;
    const uint64* parts = parts_of(scale);
    if (threadIdx.x < 32) {
      const int lane = static_cast<int>(threadIdx.x);
      uint64 first = 0, second = 0;
#pragma unroll 2
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
      if (lane == 0 && scale.outer < 0 && scale.shift < 0) search.local_count = 0;
    }
    __syncthreads();
    wanted = search.boundary_wanted;
    return search.boundary_bin;
  }

  // Sends the tokens of `bin` to the first block and what was found to all: their number, smallest and largest logit.
  // Returns that of the whole row; `fits`: the first block has them all.
  __device__ __forceinline__ BoundaryShare collect(const RankScale& scale, int bin, bool& fits) {
    auto& search = row.shared.search;
    float low = -minus_infinity(), high = minus_infinity();
    for_each_chosen(scale, [&](float logit, int token) {
      if (scale.bin(logit) != bin) return;
      low = fminf(low, logit);
      high = fmaxf(high, logit);
      const int slot = atomicAdd(&search.list_count, 1);
      if (slot < kListPerBlock) {
        row.mailbox.send(kList, 0, &search.list[row.rank * kListPerBlock + slot],
                         make_uint2(__float_as_uint(logit), static_cast<unsigned>(token)));
      }
    });
    int listed;
    const BoundaryShare sum = share_boundary(row, low, high, listed);
    fits = listed == sum.count && sum.count <= kComparedTokens;
    if (row.rank == 0) row.mailbox.receive(kList, 8u * static_cast<unsigned>(listed));
    return sum;
  }

  // By one thread of the cluster.
  __device__ __forceinline__ void publish(RankPrefix found) {
#pragma unroll 1
    for (unsigned block = 0; block < kBlocks; ++block) {
      row.mailbox.send(kFound, block, &row.shared.search.found, message(found, Answer{}));
    }
  }

  __device__ __forceinline__ RankPrefix receive() {
    row.mailbox.receive(kFound, 16);
    return read_message(row.shared.search.found, answer);
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
    const auto tied = [&](int place, float logit) {
      return make_uint2(logit == value && considered.has(logit, row.first_token + place) ? 1 : 0, 0);
    };
    row.sum_over_warps(tied);
    row.locate(tied, static_cast<uint64>(number - before),
               [&](int place) { publish({value, row.first_token + place}); });
  }

  // By the first block, after the second level: the mass of each block's tokens in the bins before the boundary.
  __device__ __forceinline__ void sum_above(int outer, int inner) {
    static_assert(kBlocks <= kWarps || kBlocks == 1);
    auto& search = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    if (warp < kBlocks) {
      uint64 sum = 0;
#pragma unroll
      for (int half = 0; half < kRankBins; half += 32) {
        const int bin = lane + half;
        if (bin < outer) sum += search.parts[0][warp * kRankBins + bin];
        if (bin < inner) sum += search.parts[Shared::kHistograms - 1][warp * kRankBins + bin];
      }
      sum = sum_over_warp(sum);
      if (lane == 0) {
        search.above[warp] = sum;
        search.kept[0][warp] = search.kept[1][warp] = 0;
      }
    }
    __syncthreads();
  }

  // By the first block, whose list has `count` tokens: the one at which the running sum in rank order reaches `wanted`; and with
  // a wish, after sum_above, its answer.
  __device__ __forceinline__ void publish_from_list(int count, uint64 wanted) {
    auto& search = row.shared.search;
    const RankedToken* tokens = gather_list(row, [&](float logit) { return amount_of(logit); });
    const int place = compared_place<kThreads>();
    const bool leads = place < count && threadIdx.x % kComparers<kThreads> == 0;
    const RankedToken own = place < count ? tokens[place] : RankedToken{0, 0};
    int rank;
    const uint64 before = compare_with_all<kThreads>(tokens, count, own, rank);
    __syncthreads();  // what follows a published prefix overwrites the tokens
    const RankPrefix mine = {logit_of(own.rank_key), static_cast<int>(token_of(own.rank_key))};
    const bool last = leads && before < wanted && wanted <= before + own.amount;
    if (wish == Wish::kNothing) {
      if (last) publish(mine);
      return;
    }
    if (leads && before < wanted) {
      const int block = mine.last / RowShape<Config>::kBlockTokens;
      atomicAdd(&search.kept[0][block], static_cast<unsigned>(own.amount) & 0xffffu);
      atomicAdd(&search.kept[1][block], static_cast<unsigned>(own.amount >> 16));
    }
    if (last) search.found = message(mine, Answer{});
    __syncthreads();
    if (threadIdx.x >= 32) return;
    const unsigned lane = threadIdx.x;
    uint64 kept = 0;
    if (lane < kBlocks) kept = search.above[lane] + search.kept[0][lane] + (static_cast<uint64>(search.kept[1][lane]) << 16);
    const Answer end = answer_of<32>(wish, kept, row.shared.random);
    Answer none;
    const RankPrefix found = read_message(search.found, none);
    __syncwarp();  // all have read what the next line overwrites
    row.mailbox.send_to_all(kFound, &search.found, message(found, end));
  }

  __device__ __forceinline__ RankPrefix all_considered() {
    row.meet();  // another search may follow at once
    return considered;
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
    const bool linear = scale.shift < 0;
    if (linear) {
      add_slice(scale);
      share_bins(scale);
      scale.outer = boundary_bin(scale, target_of, wanted);
      if (scale.outer < 0) return all_considered();
      gather_chosen(scale);
      if constexpr (Shared::kHistograms == 1) row.meet();  // all have read the first one
    } else if (threadIdx.x == 0) {
      row.shared.search.local_count = kLocalTokens + 1;
    }
#pragma unroll 1
    for (bool has_target = linear;; has_target = true) {
      if (!has_target) __syncthreads();
      add_chosen(scale);
      share_bins(scale);
      const uint64 left = wanted;
      const int bin = boundary_bin(scale, [&](uint64 total) { return has_target ? left : target_of(total); }, wanted);
      if (bin < 0) return all_considered();
      if (wish != Wish::kNothing && scale.shift < 0 && row.rank == 0) sum_above(scale.outer, bin);
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
        wish = Wish::kNothing;
        clear();
        continue;
      }
      return shorter(considered, receive());
    }
  }
};

}  // namespace fi
