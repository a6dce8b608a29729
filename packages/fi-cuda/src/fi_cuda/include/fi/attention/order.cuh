// The head of a list of tiles, longest first, from which the blocks of a launch take one after the other; and what tiles
// weigh where two kernels share steps.
#pragma once

namespace fi {

struct alignas(16) OrderHeader {
  int num_rows;  // of the list, each of which is a tile, or a piece of one, of every KV head
  int is_used;   // 0: every block has a share of its own
  int taken;     // tiles taken beyond the first of each block; 0 between launches
  int reserved;
};

// What a tile of a request with `q_len` new tokens weighs among those that make a step the prefill kernel's.
template <class Config>
__device__ __forceinline__ int weight_of_tile(int q_len) {
  if (q_len <= Config::kShortQLen) return 0;
  return q_len > Config::kTallQLen ? Config::kTallWeight : Config::kManyWeight;
}

}  // namespace fi
