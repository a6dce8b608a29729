// Planning of shared prefixes: what a block works out of a forest's nodes and the requests' lengths before it writes the list.
#pragma once

#include "fi/attention/prefix_list.cuh"
#include "fi/tile/host_device.cuh"
#include "fi/tile/scan.cuh"

namespace fi {

// As SharedPrefixes has it.
struct alignas(16) PrefixNode {
  int member_begin, member_end, kv_begin, kv_end;
};

// A node's query tokens are [t_begin, t_begin + num_tokens) of the list of tokens.
struct alignas(16) NodeWork {
  int member_begin, member_end, kv_begin, kv_end;  // as given; no members: it is not what SharedPrefixes says
  int kv_first;  // its keys begin there: those of nodes around it that are not worth it are its own
  int t_begin, num_tokens, steps;
  int parent;      // the innermost node around it, or -1
  int state;       // NodeState
  int pieces;      // of each of its tiles; 0: not used
  int first_part;
  int tiles, step_cost;  // of all of them
  int members;  // that take part
  int reserved;
};
enum NodeState : int {
  kFits = 1,  // several share it, and it begins where its parent ends
  kPays = 2,
};

// A place of the order, and its request.
struct alignas(16) PlaceWork {
  int request, q_begin, q_len, kv_len;
  int t_begin;         // its first token in the list of tokens
  int members_before;  // places before it whose requests take part
  int node;            // the innermost that is used, or -1: its keys are all its own
  int own_first;       // its own keys begin there
  int steps, pieces;   // of its own keys
  int first_part;      // or -1: none
  int first_merged;

  // Longer ones read their keys once for a whole tile anyway.
  template <class Config>
  __device__ __forceinline__ bool takes_part() const {
    return 0 < q_len && q_len <= Config::kQueryTokens;
  }
};

// What a planning block keeps, in one stretch of memory. `first_rows` of the nodes, then of the places.
struct PrefixTables {
  NodeWork* nodes;
  PlaceWork* places;
  int* first_rows;

  __device__ __forceinline__ PrefixTables(void* memory, int num_nodes, int num_requests) {
    nodes = static_cast<NodeWork*>(memory);
    places = reinterpret_cast<PlaceWork*>(nodes + num_nodes);
    first_rows = reinterpret_cast<int*>(places + num_requests + 1);
  }
};

// Costs of a batch, added up over its requests and nodes. Tokens are those of K and V.
struct BatchCost {
  static constexpr int kCount = 5;
  float own;       // of tiles of requests' own keys, in the units of the costs
  float attended;  // picoseconds, if every request attends for itself
  float tokens, shared, again;  // of all requests; of nodes; read more than once
};

// Of non-negative numbers: dividing these by a constant takes half the instructions.
__device__ __forceinline__ int quotient(int number, unsigned by) { return static_cast<int>(static_cast<unsigned>(number) / by); }
__device__ __forceinline__ int tiles_of(int num_tokens, unsigned tile_tokens) {
  return quotient(num_tokens + static_cast<int>(tile_tokens) - 1, tile_tokens);
}

// Steps of keys from the unit in which `first` lies.
template <class Config>
__device__ __forceinline__ int steps_from(int first, int end) {
  const int begin = quotient(first, Config::kAlign) * Config::kAlign;
  return end > begin ? tiles_of(end - begin, Config::kTokens) : 0;
}

// What a step of a tile costs, by the warpgroups that have rows of it.
template <class Config>
__device__ __forceinline__ int step_cost(int num_tokens) {
  const int groups = min(tiles_of(num_tokens, Config::kGroupTokens), Config::kConsumers);
  return Config::kStepCost + (groups - 1) * Config::kGroupCost;
}

// A step of all tiles of `num_tokens` tokens.
template <class Config>
__device__ __forceinline__ int step_cost_of_all(int num_tokens) {
  const int whole = quotient(num_tokens, Config::kQueryTokens), rest = num_tokens - whole * Config::kQueryTokens;
  constexpr int kWhole = Config::kStepCost + (Config::kConsumers - 1) * Config::kGroupCost;
  return whole * kWhole + (rest > 0 ? step_cost<Config>(rest) : 0);
}

// The index of the last of `count` ascending values, of which the first is 0, that is at most `value`. `guess`, which is at least 0, is
// looked at first: where every request has one row or token, it is the request's number.
template <class ValueOf>
__device__ __forceinline__ int last_at_most(int count, int value, int guess, ValueOf value_of) {
  if (guess < count && value_of(guess) == value && (guess + 1 == count || value_of(guess + 1) > value)) return guess;
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (value_of(middle) <= value) low = middle;
    else high = middle;
  }
  return low;
}

// A value of each warp of the block, in the lane of its number; `scratch` in shared memory. Lanes beyond have T().
template <int kThreads, class T>
__device__ __forceinline__ T of_all_warps(const T* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return lane < kThreads / 32 ? scratch[lane] : T();
}

// Exclusive prefix sums of `value_of(idx)` (kCount ints) over [0, count): `place(idx, before, own)` is called for every idx; `total`
// goes on from what it holds. All threads of the block call it; what they wrote is seen by all when it returns.
template <int kThreads, int kCount, class ValueOf, class Place>
__device__ __forceinline__ void scan_over(int count, int (&total)[kCount], ValueOf value_of, Place place) {
  constexpr int kWarps = kThreads / 32;
  __shared__ int warp_sums[kCount][kWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
  for (int first = 0; first < count; first += kThreads) {
    const int idx = first + static_cast<int>(threadIdx.x);
    int own[kCount] = {}, before[kCount];
    if (idx < count) value_of(idx, own);
#pragma unroll
    for (int sum = 0; sum < kCount; ++sum) {
      const int inclusive = inclusive_sum_over_lanes<32>(own[sum]);
      before[sum] = inclusive - own[sum];
      if (threadIdx.x % 32 == 31) warp_sums[sum][warp] = inclusive;
    }
    __syncthreads();
#pragma unroll
    for (int sum = 0; sum < kCount; ++sum) {
      const int of_warp = of_all_warps<kThreads>(warp_sums[sum]), through = inclusive_sum_over_lanes<kWarps>(of_warp);
      before[sum] += total[sum] + __shfl_sync(0xffffffffu, through - of_warp, warp);
      total[sum] += __shfl_sync(0xffffffffu, through, kWarps - 1);
    }
    if (idx < count) place(idx, before, own);
    __syncthreads();
  }
}

// The sum of what the threads of a block have, in a fixed order; all of them call it.
template <int kThreads>
__device__ __forceinline__ BatchCost sum_over_block(const BatchCost& mine) {
  constexpr int kWarps = kThreads / 32, kCount = BatchCost::kCount;
  __shared__ float warp_sums[kCount][kWarps];
  const float(&values)[kCount] = reinterpret_cast<const float(&)[kCount]>(mine);
  BatchCost total = {};
#pragma unroll
  for (int idx = 0; idx < kCount; ++idx) {
    float sum = values[idx];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (threadIdx.x % 32 == 0) warp_sums[idx][threadIdx.x / 32] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int idx = 0; idx < kCount; ++idx) {
    float sum = warp_sums[idx][0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) sum += warp_sums[idx][warp];
    reinterpret_cast<float(&)[kCount]>(total)[idx] = sum;
  }
  return total;
}

}  // namespace fi
