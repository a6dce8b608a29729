// The first k tokens of a row's rank order, in that order.
#pragma once

#include "fi/sampling/short_list.cuh"

namespace fi {

// Sorts `count` (a power of 2) numbers in shared memory, the largest first (Batcher, "Sorting networks and their
// applications", 1968). All threads of the block.
template <int kThreads>
__device__ __forceinline__ void sort_descending(uint64* numbers, int count) {
#pragma unroll 1
  for (int size = 2; size <= count; size *= 2) {
#pragma unroll 1
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
#pragma unroll 1
      for (int pair = static_cast<int>(threadIdx.x); pair < count / 2; pair += kThreads) {
        const int place = 2 * pair - (pair & (stride - 1));
        const uint64 first = numbers[place], second = numbers[place + stride];
        if ((first < second) == ((place & size) == 0)) {
          numbers[place] = second;
          numbers[place + stride] = first;
        }
      }
    }
  }
  __syncthreads();
}

// Most tokens that can be sorted in the memory of SearchShared::parts.
constexpr int kSortedInRow = 512;

template <class Config>
struct FirstK {
  using Row = ClusterRow<Config>;
  static constexpr int kThreads = Row::kThreads;
  static_assert(8 * kSortedInRow <= sizeof(SearchShared<Config>::parts[0]));

  Row& row;

  // Calls write(rank, logit, token) for the first k, each in one thread of the first block. `sorted`, in shared memory, has
  // room for the power of 2 that is at least k; it may be where the histograms are. NaN counts as -inf: row.largest is a number.
  template <class Write>
  __device__ __forceinline__ void run(int k, bool with_groups, uint64* sorted, Write write) {
    if (with_groups && row.usable()) {
      ShortList<Config> list{row};
      const int count = list.collect(k, true);
      if (count >= 0) {
        if (row.rank == 0) write_ranked(gather_list(row, [](float) -> uint64 { return 0; }), count, k, write);
        return;
      }
    }
    // Infinities are no part of an even scale.
    const bool finite = row.usable() && row.smallest > minus_infinity();
    PrefixSearch<Config> search{row, every_token(), true, Wish::kNothing};
    const RankScale scale =
        finite ? row_scale(row.largest, row.smallest, true) : bit_scale(row.largest, row.smallest);
    const RankPrefix prefix = search.find_from(scale, [&](uint64) { return static_cast<uint64>(k); });
    send_all(prefix, sorted);
    if (row.rank != 0) return;
    const int room = k > 1 ? 1 << (32 - __clz(k - 1)) : 1;
#pragma unroll 1
    for (int idx = k + static_cast<int>(threadIdx.x); idx < room; idx += kThreads) sorted[idx] = 0;
    row.mailbox.receive(kList, 8u * static_cast<unsigned>(k));
    sort_descending<kThreads>(sorted, room);
#pragma unroll 1
    for (int rank = static_cast<int>(threadIdx.x); rank < k; rank += kThreads) {
      write(rank, logit_of(sorted[rank]), static_cast<int>(token_of(sorted[rank])));
    }
  }

  // Sends the prefix's tokens to the first block's `sorted`, each block's after those of the blocks before.
  __device__ __forceinline__ void send_all(RankPrefix prefix, uint64* sorted) {
    auto& shared = row.shared;
    if (threadIdx.x == 0) shared.search.num_ranked = 0;
    row.sum_over_warps(
        [&](int place, float logit) { return make_uint2(prefix.has(logit, row.first_token + place) ? 1 : 0, 0); });
    uint64 before;
    row.sum_over_blocks(before);
    for_each_four<Config, 1>(shared.slice, [&](int place, float4 four) {
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {
        const float logit = e < 2 ? (e == 0 ? four.x : four.y) : (e == 2 ? four.z : four.w);
        const int token = row.first_token + place + e;
        if (prefix.has(logit, token)) {
          const int slot = static_cast<int>(before) + atomicAdd(&shared.search.num_ranked, 1);
          row.mailbox.send(kList, 0, &sorted[slot], ranked_token(logit, token, 0).rank_key);
        }
      }
    });
  }

  template <class Write>
  __device__ __forceinline__ void write_ranked(const RankedToken* tokens, int count, int k, Write write) {
    constexpr int kParts = kComparers<kThreads>;
#pragma unroll 1
    for (int base = 0; base < count; base += kComparedTokens) {
      const int place = base + compared_place<kThreads>();
      const RankedToken own = place < count ? tokens[place] : RankedToken{0, 0};
      int rank;
      compare_with_all<kThreads>(tokens, count, own, rank);
      if (place < count && place < base + kComparedTokens && rank < k && threadIdx.x % kParts == 0) {
        write(rank, logit_of(own.rank_key), static_cast<int>(token_of(own.rank_key)));
      }
    }
  }
};

}  // namespace fi
