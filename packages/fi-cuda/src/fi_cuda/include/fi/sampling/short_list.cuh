// Rows whose top_k is small: the few tokens that can be among the first k are collected by the cluster's first block, which
// applies the filters and draws.
//
// The row's tokens are split into groups, each the tokens of 8 threads, whose largest logits all blocks know. The k-th largest
// of these bounds the k-th largest logit from below, because k groups hold a token at or above it; with a few times k groups
// little more than k tokens lie above. A histogram of the groups' logits gives a bound a little lower.
#pragma once

#include "fi/sampling/filters.cuh"

namespace fi {

constexpr int kGroupBins = 256;
constexpr int kShortList = 256;

template <class Config>
struct ShortList {
  using Row = ClusterRow<Config>;
  static constexpr int kBlocks = Row::kBlocks, kThreads = Row::kThreads, kWarps = Row::kWarps;
  static constexpr int kGroups = ClusterShared<Config>::kGroups;
  static constexpr int kMaxK = kGroups / 2 < kShortList / 2 ? kGroups / 2 : kShortList / 2;
  static constexpr int kParts = kThreads / 128 > 0 ? kThreads / 128 : 1;  // lanes that share a token's comparisons

  Row& row;

  __device__ __forceinline__ static bool serves(const RowFilters& filters) {
    return filters.top_k > 0 && filters.top_k <= kMaxK && !(filters.joint && filters.has_top_p()) && !filters.greedy;
  }

  // A token: its place in the rank order (larger first), and its mass.
  struct alignas(16) Entry {
    uint64 rank_key, mass;
  };

  __device__ __forceinline__ static uint64 rank_key(float logit, unsigned token) {
    return static_cast<uint64>(order_key(logit)) << 32 | (0xffffffffu - token);
  }
  __device__ __forceinline__ static unsigned token_of(uint64 key) { return 0xffffffffu - static_cast<unsigned>(key); }

  // Collects the tokens; returns their number, or -1 if they do not fit, or with `all` if some of the first k have no mass.
  __device__ __forceinline__ int collect(int top_k, bool all) {
    auto& shared = row.shared;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    static_assert(sizeof(float) * kGroups + sizeof(unsigned) * kGroupBins <= sizeof(shared.totals));
    unsigned* bins = reinterpret_cast<unsigned*>(shared.groups() + kGroups);
#pragma unroll 1
    for (int idx = static_cast<int>(threadIdx.x); idx < kGroupBins; idx += kThreads) bins[idx] = 0;
    if (threadIdx.x == 0) {
      shared.list_count = 0;
      shared.boundary_bin = kGroupBins;
    }
    __syncthreads();
    const float bottom = fmaxf(row.largest - kMasslessShortfall, row.smallest);
    const float per_unit = row.largest > bottom ? kGroupBins / (row.largest - bottom) : 0.0f;
#pragma unroll 1
    for (int idx = static_cast<int>(threadIdx.x); idx < kGroups; idx += kThreads) {
      const float logit = shared.groups()[idx];
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
    const float limit = bin >= kGroupBins - 1 ? -minus_infinity() : static_cast<float>(bin + 1);
    for_each_four<Config, 4>(shared.slice, [&](int place, float4 four) {
      const float highest = fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w));
      if (highest >= bottom && (row.largest - highest) * per_unit < limit) {
#pragma unroll 1
        for (int e = 0; e < 4; ++e) {
          const float logit = e < 2 ? (e == 0 ? four.x : four.y) : (e == 2 ? four.z : four.w);
          if (logit >= bottom && (row.largest - logit) * per_unit < limit) {
            const int slot = atomicAdd(&shared.list_count, 1);
            if (slot < Row::kListPerBlock) {
              row.mailbox.send(kList, 0, &shared.list[row.rank * Row::kListPerBlock + slot],
                               make_uint2(__float_as_uint(logit), row.first_token + place + e));
            }
          }
        }
      }
    });
    __syncthreads();
    if (threadIdx.x < 32) {
      row.mailbox.send_to_all(kShares, reinterpret_cast<uint2*>(&shared.shares[row.rank]),
                              make_uint2(static_cast<unsigned>(shared.list_count), 0u));
    }
    row.mailbox.receive(kShares, kBlocks * 8);
    int count = 0, listed = 0;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      listed += min(shared.shares[block].count, Row::kListPerBlock);
      count += shared.shares[block].count;
    }
    if (row.rank == 0) row.mailbox.receive(kList, 8u * static_cast<unsigned>(listed));
    return listed == count && count <= kShortList ? count : -1;
  }

  // By the first block, after collect: filters and draw. Returns the token in one thread, and -1 in the others.
  __device__ __forceinline__ int draw(int count, const RowFilters& filters, RandomBits bits) {
    auto& shared = row.shared;
    Entry* entries = reinterpret_cast<Entry*>(shared.parts);  // and on through shared.totals
    static_assert(sizeof(Entry) * kShortList <= sizeof(shared.parts) + sizeof(shared.totals));
    constexpr int kPerSweep = kThreads / kParts;
    constexpr int kSweeps = kShortList / kPerSweep;
#pragma unroll 1
    for (int slot = static_cast<int>(threadIdx.x); slot < Row::kListPerBlock * kBlocks; slot += kThreads) {
      const int block = slot / Row::kListPerBlock, idx = slot % Row::kListPerBlock;
      if (idx < shared.shares[block].count) {
        int place = idx;
#pragma unroll 1
        for (int before = 0; before < block; ++before) place += shared.shares[before].count;
        const uint2 entry = shared.list[slot];
        const float logit = __uint_as_float(entry.x);
        entries[place] = {rank_key(logit, entry.y), mass_at(row.largest - logit)};
      }
    }
    __syncthreads();
    const int part = static_cast<int>(threadIdx.x) % kParts;
    Entry own[kSweeps];
    int rank[kSweeps];
    uint64 before[kSweeps];
    uint64 total = 0;
#pragma unroll
    for (int sweep = 0; sweep < kSweeps; ++sweep) {
      const int place = sweep * kPerSweep + static_cast<int>(threadIdx.x) / kParts;
      own[sweep] = place < count ? entries[place] : Entry{0, 0};
      rank[sweep] = 0;
      before[sweep] = 0;
      if (sweep * kPerSweep < count) {
#pragma unroll 2
        for (int idx = part; idx < count; idx += kParts) {
          const Entry other = entries[idx];
          if (other.rank_key > own[sweep].rank_key) {
            ++rank[sweep];
            before[sweep] += other.mass;
          }
        }
        rank[sweep] = sum_over_lanes<kParts>(rank[sweep]);
        before[sweep] = sum_over_lanes<kParts>(before[sweep]);
      }
      if (part == 0 && place < count && rank[sweep] < filters.top_k) total += own[sweep].mass;
    }
    const uint64 considered = row.prefix_over_block(total).total;
    const uint64 wanted = filters.has_top_p() ? filters.mass_target(considered) : ~0ull;
    total = 0;
#pragma unroll
    for (int sweep = 0; sweep < kSweeps; ++sweep) {
      const int place = sweep * kPerSweep + static_cast<int>(threadIdx.x) / kParts;
      bool kept = place < count && rank[sweep] < filters.top_k && (rank[sweep] == 0 || before[sweep] < wanted);
      if (filters.min_p > 0.0f) kept = kept && passes_min_p(own[sweep], filters.min_p);
      own[sweep].mass = kept ? own[sweep].mass : 0;
      if (part == 0) total += own[sweep].mass;
    }
    __syncthreads();  // all have read the masses
#pragma unroll
    for (int sweep = 0; sweep < kSweeps; ++sweep) {
      const int place = sweep * kPerSweep + static_cast<int>(threadIdx.x) / kParts;
      if (part == 0 && place < count) entries[place].mass = own[sweep].mass;
    }
    const uint64 kept_total = row.prefix_over_block(total).total;
    const uint64 target = static_cast<uint64>(scale_bits(bits, static_cast<int64>(kept_total)));
    int token = -1;
#pragma unroll
    for (int sweep = 0; sweep < kSweeps; ++sweep) {
      if (sweep * kPerSweep < count) {
        uint64 sum = 0;  // of the tokens before this one in index order
#pragma unroll 2
        for (int idx = part; idx < count; idx += kParts) {
          const Entry other = entries[idx];
          if (token_of(other.rank_key) < token_of(own[sweep].rank_key)) sum += other.mass;
        }
        sum = sum_over_lanes<kParts>(sum);
        if (part == 0 && sum <= target && target < sum + own[sweep].mass) token = static_cast<int>(token_of(own[sweep].rank_key));
      }
    }
    return token;
  }

  __device__ __forceinline__ bool passes_min_p(const Entry& entry, float min_p) const {
    const unsigned key = static_cast<unsigned>(entry.rank_key >> 32);
    const float logit = __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
    return weight_of(row.largest - logit) >= min_p;
  }
};

}  // namespace fi
