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

// The answer to kDraw or kTotal, by a whole warp, each lane with the kept mass of the block of its number.
__device__ __forceinline__ Answer answer_of(Wish wish, uint64 kept, RandomBits random) {
  const Prefix<uint64> prefix = prefix_over_lanes<32>(kept);
  if (wish == Wish::kTotal) return {0, prefix.total};
  const uint64 target = static_cast<uint64>(scale_bits(random, static_cast<int64>(prefix.total)));
  const unsigned block = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, target < prefix.inclusive))) - 1;
  return {block, target - __shfl_sync(0xffffffffu, prefix.exclusive, static_cast<int>(block))};
}

}  // namespace fi
