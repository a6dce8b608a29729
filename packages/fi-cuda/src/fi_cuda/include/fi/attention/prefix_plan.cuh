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
  int t_begin, num_tokens, kv_first, kv_end;
  int request;  // whose table is read
  int parent;   // the innermost node around it, or -1
  int fits;     // it is shared by several, and begins where its parent ends
  int pieces;   // of each of its tiles; 0: not used
  int first_row, first_part;
  int reserved[2];
};

struct alignas(16) RequestWork {
  int t_begin;   // its first token in the list of tokens
  int node;      // the innermost that is used, or -1: its keys are all its own
  int own_first; // its own keys begin there
  int pieces;
  int first_row, first_part, first_merged;
  int reserved;
};

// What a planning block keeps of nodes and requests, and what stands before each place of the order: in one stretch of memory.
struct PrefixTables {
  NodeWork* nodes;
  RequestWork* requests;
  int *place_tokens, *place_members;

  __device__ __forceinline__ PrefixTables(void* memory, int num_nodes, int num_requests) {
    nodes = static_cast<NodeWork*>(memory);
    requests = reinterpret_cast<RequestWork*>(nodes + num_nodes);
    place_tokens = reinterpret_cast<int*>(requests + num_requests);
    place_members = place_tokens + num_requests + 1;
  }
};

// What the steps of a planning block share.
struct PrefixSums {
  unsigned long long node_cost, own_cost, best;
  int longest_node, longest_own;
  int node_parts, own_chunk;
};

// Steps of keys from the unit in which `first` lies.
template <class Config>
__device__ __forceinline__ int steps_from(int first, int end) {
  const int begin = first / Config::kAlign * Config::kAlign;
  return end > begin ? (end - begin + Config::kTokens - 1) / Config::kTokens : 0;
}

__device__ __forceinline__ int tiles_of(int num_tokens, int tile_tokens) { return (num_tokens + tile_tokens - 1) / tile_tokens; }

// What a step of a tile costs, by the warpgroups that have rows of it.
template <class Config>
__device__ __forceinline__ int step_cost(int num_tokens) {
  const int groups = min(tiles_of(num_tokens, Config::kGroupTokens), Config::kConsumers);
  return Config::kStepCost + (groups - 1) * Config::kGroupCost;
}

// A step of all tiles of `num_tokens` tokens.
template <class Config>
__device__ __forceinline__ int64 step_cost_of_all(int num_tokens) {
  const int whole = num_tokens / Config::kTileTokens, rest = num_tokens % Config::kTileTokens;
  return static_cast<int64>(whole) * step_cost<Config>(Config::kTileTokens) + (rest > 0 ? step_cost<Config>(rest) : 0);
}

// The index of the last of `count` ascending values, one a record, that is at most `value`.
template <class Record>
__device__ __forceinline__ int last_at_most(const Record* records, int Record::*field, int count, int value) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (records[middle].*field <= value) low = middle;
    else high = middle;
  }
  return low;
}

// Exclusive prefix sums of `value_of(idx)` (kCount ints) over [0, count): `place(idx, before, own)` is called for every idx; `total`
// goes on from what it holds. All threads of the block call it.
template <int kThreads, int kCount, class ValueOf, class Place>
__device__ __forceinline__ void scan_over(int count, int (&total)[kCount], ValueOf value_of, Place place) {
  __shared__ int scratch[kCount][kThreads / 32];
#pragma unroll 1
  for (int first = 0; first < count; first += kThreads) {
    const int idx = first + static_cast<int>(threadIdx.x);
    int own[kCount] = {}, before[kCount];
    if (idx < count) value_of(idx, own);
#pragma unroll
    for (int sum = 0; sum < kCount; ++sum) {
      const Prefix<int> prefix = prefix_over_threads<kThreads>(own[sum], scratch[sum]);
      before[sum] = total[sum] + prefix.exclusive;
      total[sum] += prefix.total;
    }
    if (idx < count) place(idx, before, own);
    __syncthreads();
  }
}

}  // namespace fi
