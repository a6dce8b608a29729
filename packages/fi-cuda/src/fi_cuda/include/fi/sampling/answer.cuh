// What the first block tells the others when it has found the last token that is kept.
#pragma once

#include "fi/sampling/cluster_row.cuh"

namespace fi {

// What the first block can say about the kept tokens when it has found the last of them.
enum class Wish {
  kNothing,
  kDraw,   // the block that holds the token drawn, and what the running sum over that block is to exceed
  kTotal,  // their mass
};

// The answer to a wish; kUnknown where it was not cheap to know.
struct Answer {
  static constexpr unsigned kUnknown = 0xff;
  unsigned block = kUnknown;
  uint64 amount = 0;  // below 2^52

  __device__ __forceinline__ bool known() const { return block != kUnknown; }
};

__device__ __forceinline__ uint4 message(RankPrefix found, Answer answer) {
  const uint64 packed = answer.amount | static_cast<uint64>(answer.block) << 56;
  return make_uint4(__float_as_uint(found.value), static_cast<unsigned>(found.last), static_cast<unsigned>(packed),
                    static_cast<unsigned>(packed >> 32));
}

__device__ __forceinline__ RankPrefix read_message(uint4 received, Answer& answer) {
  answer = {received.w >> 24, received.z | static_cast<uint64>(received.w & 0xffffffu) << 32};
  return {__uint_as_float(received.x), static_cast<int>(received.y)};
}

// The answer to kDraw or kTotal, by a whole warp, each lane with the kept mass of the block of its number in its group of kLanes.
template <int kLanes>
__device__ __forceinline__ Answer answer_of(Wish wish, uint64 kept, RandomBits random) {
  const Prefix<uint64> prefix = prefix_over_lanes<kLanes>(kept);
  if (wish == Wish::kTotal) return {0, prefix.total};
  const uint64 target = static_cast<uint64>(scale_bits(random, static_cast<int64>(prefix.total)));
  const unsigned block = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, target < prefix.inclusive))) - 1;
  return {block, target - __shfl_sync(0xffffffffu, prefix.exclusive, static_cast<int>(block))};
}

// Of tokens at a boundary: the row's number of them, smallest and largest logit, from each thread's extremes and each block's
// search.list_count; `listed`: how many of them lists have room for.
template <class Config>
__device__ __forceinline__ BoundaryShare share_boundary(ClusterRow<Config>& row, float low, float high, int& listed) {
  using Row = ClusterRow<Config>;
  auto& shared = row.shared;
  auto& search = shared.search;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  low = smallest_of_warp(low);
  high = largest_of_warp(high);
  if (lane == 0) {
    shared.warp_smallest[warp] = low;
    shared.warp_largest[warp] = high;
  }
  __syncthreads();
  if (warp == 0) {
    low = smallest_of_warp(shared.warp_smallest[lane % Row::kWarps]);
    high = largest_of_warp(shared.warp_largest[lane % Row::kWarps]);
    const unsigned count = static_cast<unsigned>(search.list_count);
    row.mailbox.send_to_all(kShares, reinterpret_cast<uint4*>(&search.shares[row.rank]),
                            make_uint4(count, __float_as_uint(low), __float_as_uint(high), 0u));
  }
  row.mailbox.receive(kShares, Row::kBlocks * 16);
  BoundaryShare sum = {0, -minus_infinity(), minus_infinity(), 0};
  listed = 0;
#pragma unroll 2
  for (int block = 0; block < Row::kBlocks; ++block) {
    const BoundaryShare share = search.shares[block];
    listed += min(share.count, SearchShared<Config>::kListPerBlock);
    sum.count += share.count;
    sum.smallest = fminf(sum.smallest, share.smallest);
    sum.largest = fmaxf(sum.largest, share.largest);
  }
  return sum;
}

}  // namespace fi
