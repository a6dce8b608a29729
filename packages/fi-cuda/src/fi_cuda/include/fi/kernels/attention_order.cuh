// The tiles of a prefill step in the order of their length, filled on the GPU from lengths that lie there. Blocks that take the
// longest tile left are all busy until the end if tiles are many; where they are too few, the list says so and the shares of
// attention_plan.cuh are used instead.
//
// One block. Pairs of a request and a q tile are sorted by the KV steps they visit, most first: a stable counting sort in which
// every warp counts a stretch of pairs of its own, so that equal lengths give an equal list. Tiles of one warpgroup's rows or
// fewer wait for memory, not for products: they are spread over the longer tiles before them, so that both are in work at once.
// A batch that exceeds the limits, or with negative lengths, has no tiles; nor has one in which no request has more than kShortQLen
// new tokens, which another kernel serves: its list is used, and empty.
// Config: kNumThreads, kTileTokens (tokens of a q tile), kGroupTokens (of a warpgroup), kTokens (keys a step), kShortQLen, kCausal,
// kWindowed, kShift (a bin has 2^kShift numbers of steps), kWorkers, kHeads (KV heads), kItemCost, kStepCost.
// Params: q_indptr int [num_requests + 1], kv_lens int [num_requests]; tile_prefix int [num_requests + 1] (scratch); items int
// [., 16] (fi/attention/item.cuh, without head), header int [4] (fi/attention/order.cuh); max_pairs, max_q_tokens, max_q_len,
// max_kv_len; num_requests, window.
#pragma once

#include "fi/attention/order.cuh"
#include "fi/ptx/dependent_launch.cuh"
#include "fi/tile/host_device.cuh"
#include "fi/tile/scan.cuh"

namespace fi {

constexpr int kOrderBins = 256;

// A request's tile: its steps of keys are [kv_begin, kv_stop).
struct OrderedTile {
  int request, q_tile, q_begin, q_len, kv_len, kv_begin, kv_stop, bin;
};

template <class Config>
__device__ __forceinline__ int bin_of(int steps) {
  return kOrderBins - 1 - min(steps >> Config::kShift, kOrderBins - 1);  // most steps first
}

// `first_bin`: that of the longest tile, or before it.
template <class Config, class Params>
__device__ __forceinline__ OrderedTile tile_at(const Params& params, int first_bin, int pair) {
  const int* prefix = static_cast<const int*>(params.tile_prefix);
  int low = 0, high = params.num_requests;  // the last request with prefix <= pair, which has tiles
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (prefix[middle] <= pair) low = middle;
    else high = middle;
  }
  OrderedTile tile;
  tile.request = low;
  tile.q_tile = pair - prefix[low];
  tile.q_begin = static_cast<const int*>(params.q_indptr)[low];
  tile.q_len = static_cast<const int*>(params.q_indptr)[low + 1] - tile.q_begin;
  tile.kv_len = static_cast<const int*>(params.kv_lens)[low];
  const int offset = tile.kv_len - tile.q_len, begin = tile.q_tile * Config::kTileTokens;
  tile.kv_stop = Config::kCausal ? max(offset + min(begin + Config::kTileTokens, tile.q_len), 0) : tile.kv_len;
  tile.kv_begin = 0;
  if constexpr (Config::kWindowed) {
    tile.kv_begin = min(max(offset + begin - params.window + 1, 0), tile.kv_stop) / Config::kTokens * Config::kTokens;
  }
  tile.bin = bin_of<Config>((tile.kv_stop - tile.kv_begin + Config::kTokens - 1) / Config::kTokens);
  if (tile.q_len - begin <= Config::kGroupTokens) {
    const unsigned spread = static_cast<unsigned>(tile.request) * 2654435761u >> 16;
    tile.bin = first_bin + static_cast<int>(spread % static_cast<unsigned>(tile.bin - first_bin + 1));
  }
  return tile;
}

struct OrderedPairs {
  int count, first_bin;
};

// Fills tile_prefix; counts the pairs, none unless the batch is within the limits.
template <class Config, class Params>
__device__ __forceinline__ OrderedPairs count_pairs(const Params& params) {
  constexpr int kThreads = Config::kNumThreads;
  __shared__ int warp_sums[kThreads / 32];
  __shared__ int longest;
  __shared__ bool some_long;
  const int* q_indptr = static_cast<const int*>(params.q_indptr);
  const int* kv_lens = static_cast<const int*>(params.kv_lens);
  int* prefix = static_cast<int*>(params.tile_prefix);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    longest = 0;
    some_long = false;
  }
  __syncthreads();
  int before = 0;
  bool within = true;
  for (int first = 0; first < params.num_requests; first += kThreads) {
    const int request = first + thread;
    int tiles = 0;
    if (request < params.num_requests) {
      const int begin = q_indptr[request], end = q_indptr[request + 1], kv_len = kv_lens[request];
      const bool fits = 0 <= begin && begin <= end && end <= params.max_q_tokens && end - begin <= params.max_q_len &&
                        0 <= kv_len && kv_len <= params.max_kv_len;
      if (fits) tiles = (end - begin + Config::kTileTokens - 1) / Config::kTileTokens;
      within &= fits;
      if (tiles > 0) atomicMax(&longest, kv_len);
      if (end - begin > Config::kShortQLen) some_long = true;
    }
    const int inclusive = inclusive_sum_over_lanes<32>(tiles);
    if (thread % 32 == 31) warp_sums[thread / 32] = inclusive;
    within = __syncthreads_and(within);
    int others = before;
    for (int warp = 0; warp < kThreads / 32; ++warp) {
      if (warp < thread / 32) others += warp_sums[warp];
      before += warp_sums[warp];
    }
    if (request < params.num_requests) prefix[request] = others + inclusive - tiles;
    __syncthreads();
  }
  if (thread == 0) prefix[params.num_requests] = before;
  __syncthreads();
  const int most_steps = (longest + Config::kTokens - 1) / Config::kTokens;
  const bool has_tiles = within && before <= params.max_pairs && some_long;
  return {has_tiles ? before : 0, bin_of<Config>(most_steps)};
}

// What a tile of a bin costs at most.
template <class Config>
__device__ __forceinline__ int64 cost_of_bin(int bin) {
  return Config::kItemCost + static_cast<int64>(Config::kStepCost) * (((kOrderBins - bin) << Config::kShift) - 1);
}

// Whether blocks that take the longest tile left end at about the same time: rounds of one tile a block, each as long as its
// first tile, must take at most a tenth longer than equal shares. `begins`: pairs before each bin.
template <class Config>
__device__ __forceinline__ bool are_many(const int* begins, int num_pairs) {
  __shared__ unsigned long long sums[2];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 2) sums[thread] = 0;
  __syncthreads();
  if (thread < kOrderBins) {
    atomicAdd(&sums[0], static_cast<unsigned long long>((begins[thread + 1] - begins[thread]) * cost_of_bin<Config>(thread)));
  }
  const int64 num_tiles = static_cast<int64>(num_pairs) * Config::kHeads;
  for (int64 first = static_cast<int64>(thread) * Config::kWorkers; first < num_tiles;
       first += static_cast<int64>(Config::kNumThreads) * Config::kWorkers) {
    const int pair = static_cast<int>(first / Config::kHeads);
    int low = 0, high = kOrderBins;  // the last bin that begins at or before the pair
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (begins[middle] <= pair) low = middle;
      else high = middle;
    }
    atomicAdd(&sums[1], static_cast<unsigned long long>(cost_of_bin<Config>(low)));
  }
  __syncthreads();
  return sums[1] * Config::kWorkers * 10 <= sums[0] * Config::kHeads * 11;
}

template <class Config, class Params>
__device__ __forceinline__ void attention_order(const Params& params) {
  constexpr int kWarps = Config::kNumThreads / 32;
  static_assert(Config::kNumThreads >= kOrderBins);
  __shared__ int counts[kWarps][kOrderBins];
  __shared__ int begins[kOrderBins + 1];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  for (int idx = thread; idx < kWarps * kOrderBins; idx += Config::kNumThreads) counts[0][idx] = 0;
  ptx::allow_next_kernel();  // which waits for the end of this one
  ptx::wait_for_previous_kernel();
  const OrderedPairs pairs = count_pairs<Config>(params);
  const int num_pairs = pairs.count;
  const int stretch = (num_pairs + kWarps * 32 - 1) / (kWarps * 32) * 32;
  const int first = warp * stretch, end = min(first + stretch, num_pairs);
  for (int pair = first + lane; pair < end; pair += 32) atomicAdd(&counts[warp][tile_at<Config>(params, pairs.first_bin, pair).bin], 1);
  __syncthreads();
  // Places: bins in order, and in a bin warps in order.
  int total = 0;
  if (thread < kOrderBins) {
    for (int idx = 0; idx < kWarps; ++idx) total += counts[idx][thread];
    begins[thread + 1] = total;
  }
  __syncthreads();
  if (warp == 0) {
    int before = 0;
    for (int base = 0; base < kOrderBins; base += 32) {
      const int inclusive = inclusive_sum_over_lanes<32>(begins[base + lane + 1]);
      begins[base + lane + 1] = before + inclusive;
      before += __shfl_sync(0xffffffffu, inclusive, 31);
    }
    if (lane == 0) begins[0] = 0;
  }
  __syncthreads();
  if (thread < kOrderBins) {
    int place = begins[thread];
    for (int idx = 0; idx < kWarps; ++idx) {
      const int count = counts[idx][thread];
      counts[idx][thread] = place;
      place += count;
    }
  }
  const bool many = are_many<Config>(begins, num_pairs);
  if (thread == 0) *static_cast<OrderHeader*>(params.header) = {num_pairs, many, 0, 0};
  if (!many) return;
  int4* items = static_cast<int4*>(params.items);
  for (int base = first; base < end; base += 32) {
    const int pair = base + lane;
    const unsigned active = __ballot_sync(0xffffffffu, pair < end);
    if (pair >= end) continue;
    const OrderedTile tile = tile_at<Config>(params, pairs.first_bin, pair);
    const unsigned equal = __match_any_sync(active, tile.bin);
    const int place = counts[warp][tile.bin] + __popc(equal & ((1u << lane) - 1));
    __syncwarp(active);
    if ((equal >> lane) == 1u) counts[warp][tile.bin] = place + 1;  // the last of the equal ones
    __syncwarp(active);
    int4* row = items + static_cast<int64>(place) * 4;
    row[0] = {tile.request, 0, tile.q_tile, 0};
    row[1] = {tile.kv_begin, tile.kv_stop, -1, 0};
    row[2] = {tile.q_begin, tile.q_len, tile.kv_len, -1};
    row[3] = {0, 0, 0, 0};
  }
}

}  // namespace fi
