// Rows whose top_k is small: the few tokens that can be among the first k are collected by the cluster's first block, which
// applies the filters and draws.
//
// The row's tokens are split into groups, each the tokens of 8 threads, whose largest logits all blocks know. The k-th largest
// of these bounds the k-th largest logit from below, because k groups hold a token at or above it; with a few times k groups
// little more than k tokens lie above. A histogram of the groups' logits gives a bound a little lower.
#pragma once

#include "fi/sampling/filters.cuh"

namespace fi {

template <class Config>
struct ShortList {
  using Row = ClusterRow<Config>;
  static constexpr int kBlocks = Row::kBlocks, kThreads = Row::kThreads, kWarps = Row::kWarps;
  static constexpr int kGroups = ClusterShared<Config>::kGroups;
  static constexpr int kListPerBlock = SearchShared<Config>::kListPerBlock;
  // Whether row.own_largest is of the tokens that for_each_four gives this thread.
  static constexpr bool kKnowsOwn = sizeof(typename Config::Dtype) == 4 && Config::kVectorBytes == 16;
  static constexpr int kMaxK = kGroups * 8 / 15 < kMaxRanked / 2 ? kGroups * 8 / 15 : kMaxRanked / 2;

  Row& row;

  __device__ __forceinline__ static bool serves(const RowFilters& filters) {
    return filters.top_k > 0 && filters.top_k <= kMaxK && !filters.greedy;
  }

  // Collects the tokens; returns their number, or -1 if they do not fit, or with `all` if some of the first k have no mass.
  __device__ __forceinline__ int collect(int top_k, bool all) {
    auto& shared = row.shared.search;
    const int lane = static_cast<int>(threadIdx.x % 32);
    unsigned* bins = shared.group_bins;
#pragma unroll 1
    for (int idx = static_cast<int>(threadIdx.x); idx < kGroupBins; idx += kThreads) bins[idx] = 0;
    if (threadIdx.x == 0) {
      shared.list_count = 0;
      shared.boundary_bin = kGroupBins;
    }
    __syncthreads();
    // The smallest of the groups' logits that is one: where rows have no tails, few tokens lie above it.
    const float massless = row.largest - kMasslessShortfall;
    float least = -minus_infinity();
#pragma unroll 1
    for (int idx = lane; idx < kGroups; idx += 32) {
      const float logit = shared.groups[idx];
      if (logit > minus_infinity()) least = fminf(least, logit);
    }
    float bottom = fmaxf(massless, smallest_of_warp(least));
    const float per_unit = row.largest > bottom ? fminf(kGroupBins / (row.largest - bottom), 3.4e38f) : 0.0f;  // finite
#pragma unroll 1
    for (int idx = static_cast<int>(threadIdx.x); idx < kGroups; idx += kThreads) {
      const float logit = shared.groups[idx];
      if (logit >= bottom) {
        atomicAdd(&bins[min(__float2int_rz((row.largest - logit) * per_unit), kGroupBins - 1)], 1u);
      }
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      constexpr int kEach = kGroupBins / 32;
      int mine[kEach];
      int sum = 0;
#pragma unroll
      for (int idx = 0; idx < kEach; ++idx) sum += mine[idx] = static_cast<int>(bins[lane * kEach + idx]);
      const Prefix<int> prefix = prefix_over_lanes<32>(sum);
      if (prefix.exclusive < top_k && top_k <= prefix.inclusive) {
        int before = prefix.exclusive, idx = 0;
        bool reached = false;
#pragma unroll
        for (int next = 0; next < kEach - 1; ++next) {
          before += mine[next];
          reached = reached || before >= top_k;
          idx += reached ? 0 : 1;
        }
        shared.boundary_bin = lane * kEach + idx;
      }
    }
    __syncthreads();
    const int bin = shared.boundary_bin;
    if (all && bin == kGroupBins) return -1;
    if (bin == kGroupBins) bottom = massless;  // fewer groups than top_k have a token with mass
    const float limit = bin >= kGroupBins - 1 ? -minus_infinity() : static_cast<float>(bin + 1);
    const auto above = [&](float logit) { return logit >= bottom && (row.largest - logit) * per_unit < limit; };
    const auto visit = [&](int place, float4 four) {
      if (!above(fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w)))) return;
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {
        const float logit = e < 2 ? (e == 0 ? four.x : four.y) : (e == 2 ? four.z : four.w);
        if (above(logit)) {
          const int slot = atomicAdd(&shared.list_count, 1);
          if (slot < kListPerBlock) {
            row.mailbox.send(kList, 0, &shared.list[row.rank * kListPerBlock + slot],
                             make_uint2(__float_as_uint(logit), row.first_token + place + e));
          }
        }
      }
    };
    if constexpr (kKnowsOwn) {
      // Few threads have one: all lanes look at each of these's tokens.
      const int base = static_cast<int>(threadIdx.x / 32) * RowShape<Config>::kWarpTokens;
#pragma unroll 1
      for (unsigned lanes = __ballot_sync(0xffffffffu, above(row.own_largest)); lanes != 0; lanes &= lanes - 1) {
        const int theirs = (__ffs(static_cast<int>(lanes)) - 1) * 4;
#pragma unroll 1
        for (int offset = lane * 128 + theirs; offset < RowShape<Config>::kWarpTokens; offset += 32 * 128) {
          visit(base + offset, *reinterpret_cast<const float4*>(row.shared.slice + base + offset));
        }
      }
    } else {
      for_each_four<Config, 4>(row.shared.slice, visit);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      row.mailbox.send_to_all(kShares, reinterpret_cast<uint2*>(&shared.shares[row.rank]),
                              make_uint2(static_cast<unsigned>(shared.list_count), 0u));
    }
    row.mailbox.receive(kShares, kBlocks * 8);
    int count = 0, listed = 0;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      listed += min(shared.shares[block].count, kListPerBlock);
      count += shared.shares[block].count;
    }
    if (row.rank == 0) row.mailbox.receive(kList, 8u * static_cast<unsigned>(listed));
    return listed == count && count <= kMaxRanked ? count : -1;
  }

  // By the first block, after collect: filters and draw; for a joint top_p the first thread has left the row's mass in
  // boundary_wanted. Returns the token in one thread, and -1 in the others.
  __device__ __forceinline__ int draw(int count, const RowFilters& filters, RandomBits bits) {
    RankedToken* tokens = gather_list(row, [&](float logit) { return mass_at(row.largest - logit); });
    constexpr int kSweeps = kMaxRanked / kComparedTokens;
    // Lanes that share a token's comparisons: twice as many where tokens are few.
    const bool few = count <= kComparedTokens / 2;
    const int parts = few ? 2 * kComparers<kThreads> : kComparers<kThreads>;
    const int first = static_cast<int>(threadIdx.x) / parts, part = static_cast<int>(threadIdx.x) % parts;
    const bool leads = part == 0 && first < kComparedTokens;
    RankedToken own[kSweeps];
    int rank[kSweeps];
    uint64 before[kSweeps];
    uint64 total = 0;
#pragma unroll
    for (int sweep = 0; sweep < kSweeps; ++sweep) {
      const int place = sweep * kComparedTokens + first;
      own[sweep] = place < count ? tokens[place] : RankedToken{0, 0};
      rank[sweep] = 0x7fffffff;
      if (sweep * kComparedTokens < count) {
        before[sweep] = sum_before(tokens, count, own[sweep], part, parts, rank[sweep]);
        rank[sweep] = sum_over_comparers<kThreads>(rank[sweep], few);
        before[sweep] = sum_over_comparers<kThreads>(before[sweep], few);
      }
      if (leads && rank[sweep] < filters.top_k) total += own[sweep].amount;
    }
    const uint64 considered = row.sum_over_block(total);
    const uint64 wanted = filters.has_top_p() ? filters.mass_target(filters.joint ? row.shared.search.boundary_wanted : considered) : ~0ull;
    total = 0;
#pragma unroll
    for (int sweep = 0; sweep < kSweeps; ++sweep) {
      bool kept = rank[sweep] < filters.top_k && before[sweep] < wanted;
      if (Config::kMinP) kept = kept && weight_of(row.largest - logit_of(own[sweep].rank_key)) >= filters.min_p;
      if (!kept) own[sweep].amount = 0;
      if (leads) total += own[sweep].amount;
    }
    __syncthreads();  // all have read the masses
#pragma unroll
    for (int sweep = 0; sweep < kSweeps; ++sweep) {
      const int place = sweep * kComparedTokens + first;
      if (leads && place < count) tokens[place].amount = own[sweep].amount;
    }
    const uint64 kept_total = row.sum_over_block(total);
    const uint64 target = static_cast<uint64>(scale_bits(bits, static_cast<int64>(kept_total)));
    int token = -1;
#pragma unroll
    for (int sweep = 0; sweep < kSweeps; ++sweep) {
      if (sweep * kComparedTokens < count) {
        const unsigned mine = token_of(own[sweep].rank_key);
        uint64 sum = 0;  // of the tokens before this one in index order
#pragma unroll 2
        for (int idx = part; idx < count; idx += parts) {
          const RankedToken other = tokens[idx];
          if (token_of(other.rank_key) < mine) sum += other.amount;
        }
        sum = sum_over_comparers<kThreads>(sum, few);
        if (leads && sum <= target && target < sum + own[sweep].amount) token = static_cast<int>(mine);
      }
    }
    return token;
  }
};

}  // namespace fi
