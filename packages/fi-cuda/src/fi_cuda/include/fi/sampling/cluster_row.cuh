// A cluster's work on the row that it holds: extremes, sums and the place where a running sum crosses a target.
#pragma once

#include "fi/sampling/exchange.cuh"
#include "fi/sampling/row.cuh"
#include "fi/sampling/weight.cuh"
#include "fi/tile/scan.cuh"

namespace fi {

// The first tokens of the rank order (descending logit, then ascending token): those above `value`, and those equal to it up
// to token `last`.
struct alignas(8) RankPrefix {
  float value;
  int last;

  __device__ __forceinline__ bool has(float logit, int token) const {
    return logit > value || (logit == value && token <= last);
  }
};

__device__ __forceinline__ RankPrefix every_token() { return {minus_infinity(), 0x7fffffff}; }

__device__ __forceinline__ RankPrefix shorter(RankPrefix first, RankPrefix second) {
  const bool choose_first = first.value > second.value || (first.value == second.value && first.last < second.last);
  return choose_first ? first : second;
}

constexpr int kRankBins = 512;
constexpr int kListEntries = 640;

// What a block found among the tokens at a boundary.
struct BoundaryShare {
  int count;
  float smallest, largest;
  int unused;
};

template <class Config>
struct ClusterShared {
  static constexpr int kBlocks = Config::kClusterBlocks;
  static constexpr int kWarps = RowShape<Config>::kWarps;
  static constexpr int kGroups = kBlocks * kWarps * 4;

  alignas(16) float slice[RowShape<Config>::kBlockTokens];
  // The block's histogram: amounts as their lower 16 bits and the rest, whose sums fit 32 bits. Afterwards, in the first
  // block, the tokens at the boundary: (logit, token), a part for each block.
  alignas(16) uint2 list[kListEntries];
  alignas(16) uint64 totals[kRankBins];  // the row's histogram
  alignas(16) float groups[kGroups];     // largest logit of each 8 threads' tokens
  alignas(16) BoundaryShare shares[kBlocks];
  uint2 extremes[kBlocks];  // largest and smallest logit of each block
  uint64 block_amount[kBlocks];
  uint64 warp_amount[kWarps];
  uint64 scratch[kWarps];
  uint64 boundary_before;
  float warp_largest[kWarps], warp_smallest[kWarps];
  RankPrefix found;
  int boundary_bin;
  int list_count;
};

template <class Config>
struct ClusterRow {
  using Shape = RowShape<Config>;
  static constexpr int kBlocks = Config::kClusterBlocks;
  static constexpr int kThreads = Config::kNumThreads;
  static constexpr int kWarps = Shape::kWarps;
  static constexpr int kListPerBlock = kListEntries / kBlocks;

  ClusterShared<Config>& shared;
  int rank, first_token;
  float largest, smallest;  // of the whole row

  // Makes the row's extremes known to all blocks, and with `with_groups` the largest logits of all groups of 8 threads. The
  // cluster's first barrier has been arrived at.
  __device__ __forceinline__ void share_extremes(Extremes mine, bool with_groups) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const auto larger = [](float first, float second) { return ptx::max_or_nan(first, second); };
    const auto smaller = [](float first, float second) { return fminf(first, second); };
    const float group = reduce_over_lanes<8>(mine.largest, larger);
    const float in_warp = reduce_over_lanes<4, 8>(group, larger);
    const float least = reduce_over_lanes<32>(mine.smallest, smaller);
    float* own_groups = shared.groups + rank * kWarps * 4;
    if (lane % 8 == 0) own_groups[warp * 4 + lane / 8] = group;
    if (lane == 0) {
      shared.warp_largest[warp] = in_warp;
      shared.warp_smallest[warp] = least;
    }
    __syncthreads();
    if constexpr (kBlocks > 1) ptx::cluster_wait();
    if (warp == 0) {
      const float block_largest = reduce_over_lanes<32>(shared.warp_largest[lane % kWarps], larger);
      const float block_smallest = reduce_over_lanes<32>(shared.warp_smallest[lane % kWarps], smaller);
      push_to_all<kBlocks>(&shared.extremes[rank], make_uint2(__float_as_uint(block_largest), __float_as_uint(block_smallest)));
    }
    if (with_groups) {
#pragma unroll 1
      for (int idx = static_cast<int>(threadIdx.x); idx < kWarps * kBlocks; idx += kThreads) {
        uint4* four = reinterpret_cast<uint4*>(own_groups) + idx % kWarps;
        ptx::store_to_cluster(ptx::address_in_cluster(four, static_cast<unsigned>(idx / kWarps)), *four);
      }
    }
    cluster_sync<kBlocks>();
    const uint2 theirs = shared.extremes[lane % kBlocks];
    largest = reduce_over_lanes<kBlocks>(__uint_as_float(theirs.x), larger);
    smallest = reduce_over_lanes<kBlocks>(__uint_as_float(theirs.y), smaller);
  }

  // Reads the row, scaled by `temperature`, and shares its extremes.
  template <class T>
  __device__ __forceinline__ void load(const T* logits, int vocab_size, float temperature, bool with_groups) {
    Extremes mine = load_slice<Config>(logits, first_token, vocab_size, shared.slice);
    if (temperature != 1.0f) mine = divide_slice<Config>(shared.slice, temperature);
    share_extremes(mine, with_groups);
  }

  // Whether a token can be drawn: no logit is NaN or +inf, and one is finite.
  __device__ __forceinline__ bool usable() const { return fabsf(largest) < -minus_infinity(); }

  // The block's sum of amount(place, logit), and in shared.warp_amount each warp's. The previous use of that is behind a
  // barrier.
  template <class Amount>
  __device__ __forceinline__ uint64 sum_over_block(Amount amount) {
    uint64 sum = 0;
    for_each_four<Config>(shared.slice, [&](int place, float4 four) {
      sum += amount(place, four.x) + amount(place + 1, four.y) + amount(place + 2, four.z) + amount(place + 3, four.w);
    });
    sum = sum_over_lanes<32>(sum);
    if (threadIdx.x % 32 == 0) shared.warp_amount[threadIdx.x / 32] = sum;
    __syncthreads();
    uint64 total = 0;
#pragma unroll 4
    for (int warp = 0; warp < kWarps; ++warp) total += shared.warp_amount[warp];
    return total;
  }

  // After sum_over_block: calls found(place) in one thread for the first place whose inclusive running sum of the block
  // exceeds `target`, which is below the block's sum.
  template <class Amount, class Found>
  __device__ __forceinline__ void locate(Amount amount, uint64 target, Found found) {
    int warp = 0;
#pragma unroll 1
    while (warp < kWarps - 1 && target >= shared.warp_amount[warp]) target -= shared.warp_amount[warp++];
    constexpr int kEach = (Shape::kWarpTokens + kThreads - 1) / kThreads;
    const int first = static_cast<int>(threadIdx.x) * kEach;
    const int base = warp * Shape::kWarpTokens;
    uint64 sum = 0;
#pragma unroll 1
    for (int idx = first; idx < first + kEach; ++idx) {
      if (idx < Shape::kWarpTokens) sum += amount(base + idx, shared.slice[base + idx]);
    }
    const Prefix<uint64> prefix = prefix_over_threads<kThreads>(sum, shared.scratch);
    if (prefix.exclusive <= target && target < prefix.inclusive) {
      uint64 before = prefix.exclusive;
      int place = base + first;
      while (true) {
        before += amount(place, shared.slice[place]);
        if (before > target) break;
        ++place;
      }
      found(place);
    }
  }

  // Sum of what the blocks shared in block_amount, and of those before this block.
  __device__ __forceinline__ uint64 sum_over_blocks(uint64& before) const {
    uint64 total = 0;
    before = 0;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (block == rank) before = total;
      total += shared.block_amount[block];
    }
    return total;
  }
};

}  // namespace fi
