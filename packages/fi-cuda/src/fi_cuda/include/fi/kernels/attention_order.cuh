// The tiles of a prefill step in the order of their length, filled on the GPU from lengths that lie there. Blocks that take the
// longest tile left are all busy until the end if tiles are many; where they are too few, the list says so and the shares of
// attention_plan.cuh are used instead.
//
// What is left after whole rounds of a tile a block may be taken in pieces, of which all blocks get about as many. The first
// pieces of tiles that are equally long stand before the second ones: blocks that read the same keys for other queries do so at
// about the same time, out of L2, which shares do not ("stream-K" with whole tiles first: Osama et al., 2023, section 5.2).
//
// One block. Pairs of a request and a q tile are sorted by the KV steps they visit (fewer count where warpgroups have no rows), most first: a stable counting sort in which
// every warp counts a stretch of pairs of its own, so that equal lengths give an equal list. Tiles of one warpgroup's rows or
// fewer wait for memory, not for products: they are spread over the longer tiles before them, so that both are in work at once.
// A batch that exceeds the limits, or with negative lengths, has no tiles; nor has one whose tiles of all heads weigh at most kMostShort,
// which another kernel serves: its list is used, and empty. A tile weighs kTallWeight in requests of more than kTallQLen new
// tokens, kManyWeight in others of more than kShortQLen, else nothing.
// Config: kNumThreads, kTileTokens (tokens of a q tile), kGroupTokens (of a warpgroup), kTokens (keys a step), kUnit (of a tile's first
// key, under a window), kShortQLen, kMostShort, kTallQLen, kManyWeight, kTallWeight, kCausal,
// kWindowed, kShift (a bin has 2^kShift numbers of steps), kWorkers, kHeads (KV heads), kPieces (of a tile, at most 32), kSlots
// (of all tiles), kItemCost, kStepCost, kPieceCost (what a piece costs beyond an item),
// kFastMemory (blocks may all read keys of their own at the pace of their products).
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

// Steps of a full tile that take as long as `num_steps` of one with `num_tokens` tokens: its warpgroups without rows stand aside,
// but the others wait for a step's products twice.
template <class Config>
__device__ __forceinline__ int full_steps(int num_steps, int num_tokens) {
  constexpr int kGroups = Config::kTileTokens / Config::kGroupTokens;
  const int groups = min((num_tokens + Config::kGroupTokens - 1) / Config::kGroupTokens, kGroups);
  return (num_steps * (groups + 2) + kGroups + 1) / (kGroups + 2);
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
    tile.kv_begin = min(max(offset + begin - params.window + 1, 0), tile.kv_stop) / Config::kUnit * Config::kUnit;
  }
  const int num_steps = (tile.kv_stop - tile.kv_begin + Config::kTokens - 1) / Config::kTokens;
  const int left = tile.q_len - begin;
  if (left > Config::kGroupTokens) {
    tile.bin = bin_of<Config>(full_steps<Config>(num_steps, left));
  } else {
    tile.bin = bin_of<Config>(num_steps);
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
  __shared__ int long_tiles;
  const int* q_indptr = static_cast<const int*>(params.q_indptr);
  const int* kv_lens = static_cast<const int*>(params.kv_lens);
  int* prefix = static_cast<int*>(params.tile_prefix);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    longest = 0;
    long_tiles = 0;
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
      if (end - begin > Config::kShortQLen) atomicAdd(&long_tiles, tiles * weight_of_tile<Config>(end - begin));
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
  int most_keys = longest;
  if constexpr (Config::kWindowed) most_keys = min(longest, min(longest, params.window) + Config::kTileTokens + Config::kUnit);
  const int most_steps = (most_keys + Config::kTokens - 1) / Config::kTokens;
  const bool is_long = static_cast<int64>(long_tiles) * Config::kHeads > Config::kMostShort;
  const bool has_tiles = within && before <= params.max_pairs && is_long;
  return {has_tiles ? before : 0, bin_of<Config>(most_steps)};
}

// What a tile of a bin costs at most.
template <class Config>
__device__ __forceinline__ int64 cost_of_bin(int bin) {
  return Config::kItemCost + static_cast<int64>(Config::kStepCost) * (((kOrderBins - bin) << Config::kShift) - 1);
}

// What becomes of the tiles: the first `num_whole` pairs stay whole, the others have `pieces` each, taken in `rounds` of all blocks.
struct Arrangement {
  int is_used, num_whole, pieces, rounds;
};

// The bin of the pair at a place of the order; `begins`: pairs before each bin.
__device__ __forceinline__ int bin_at(const int* begins, int place) {
  int low = 0, high = kOrderBins;  // the last bin that begins at or before the place
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (begins[middle] <= place) low = middle;
    else high = middle;
  }
  return low;
}

// The arrangement of the shortest time, by a model in which a round of one tile a block takes as long as its first tile; unused
// where that is a tenth longer than equal shares (if tiles may be in pieces: of two pieces each), or, where no tile is whole and memory
// is fast enough for shares, a twentieth. More pieces have to save a thirtieth.
template <class Config>
__device__ __forceinline__ Arrangement arrange(const int* begins, int num_pairs) {
  constexpr int kWorkers = Config::kWorkers, kHeads = Config::kHeads, kPiece = Config::kItemCost + Config::kPieceCost;
  __shared__ unsigned long long sums[2];  // of all tiles of a head; of whole rounds
  __shared__ Arrangement found;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 2) sums[thread] = 0;
  __syncthreads();
  if (thread < kOrderBins) {
    atomicAdd(&sums[0], static_cast<unsigned long long>((begins[thread + 1] - begins[thread]) * cost_of_bin<Config>(thread)));
  }
  const int num_rounds = static_cast<int>(static_cast<int64>(num_pairs) * kHeads / kWorkers);
  for (int round = thread; round < num_rounds; round += Config::kNumThreads) {
    const int bin = bin_at(begins, static_cast<int>(static_cast<int64>(round) * kWorkers / kHeads));
    atomicAdd(&sums[1], static_cast<unsigned long long>(cost_of_bin<Config>(bin)));
  }
  __syncthreads();
  if (thread < 32) {
    const int num_whole = static_cast<int>(static_cast<int64>(num_rounds) * kWorkers / kHeads);
    const int num_left = (num_pairs - num_whole) * kHeads, pieces = thread + 1;  // fewer left than workers and heads together
    const bool allowed = pieces == 1 || (pieces <= Config::kPieces && num_left * pieces <= Config::kSlots);
    int64 rest = 0;
    if (pieces == 1) {
      if (num_left > 0) rest = cost_of_bin<Config>(bin_at(begins, num_whole));
    } else if (allowed) {
      for (int first = 0; first < num_left * pieces; first += kWorkers) {
        const int64 cost = cost_of_bin<Config>(bin_at(begins, num_whole + first / (kHeads * pieces)));
        rest += (cost - Config::kItemCost + pieces - 1) / pieces + kPiece;
      }
    }
    int64 total = allowed ? static_cast<int64>(sums[1]) + rest : int64{1} << 62;
    const int64 whole = __shfl_sync(0xffffffffu, total, 0);
    int best = pieces;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const int64 other = __shfl_xor_sync(0xffffffffu, total, distance);
      const int its = __shfl_xor_sync(0xffffffffu, best, distance);
      if (other < total || (other == total && its < best)) {
        total = other;
        best = its;
      }
    }
    if (total * 30 > whole * 29) {
      total = whole;
      best = 1;
    }
    const int64 shares = static_cast<int64>(sums[0]) * kHeads + (Config::kPieces > 1 ? int64{2} * kPiece * kWorkers : 0);
    if (thread == 0) {
      const int rounds = ((num_pairs - num_whole) * kHeads * best + kWorkers - 1) / kWorkers;
      const bool may_share = Config::kFastMemory && num_rounds == 0;
      const bool is_used = may_share ? total * kWorkers * 20 <= shares * 21 : total * kWorkers * 10 <= shares * 11;
      found = {is_used, best == 1 ? num_pairs : num_whole, best, rounds};
    }
  }
  __syncthreads();
  return found;
}

// The place among the rows of tiles in pieces of row `idx` of those whose bin it is. In every round come as many rows of a bin as in
// any other, longer ones first: tiles of one request, of which the last takes less time if it has fewer rows, then read the same keys
// at about the same time, and blocks have as even loads as in the order of length.
__device__ __forceinline__ int place_in_rounds(const int* begins, const Arrangement& arrangement, int bin, int idx) {
  const auto rows_of = [&](int other) { return (begins[other + 1] - max(begins[other], arrangement.num_whole)) * arrangement.pieces; };
  const auto within = [&](int rounds, int num_rows) { return (rounds * num_rows + arrangement.rounds - 1) / arrangement.rounds; };
  const int round = idx * arrangement.rounds / rows_of(bin);
  int place = idx - within(round, rows_of(bin));
  for (int pair = arrangement.num_whole; pair < begins[kOrderBins];) {
    const int other = bin_at(begins, pair);
    place += within(other < bin ? round + 1 : round, rows_of(other));
    pair = begins[other + 1];
  }
  return place;
}

// The rows of a pair, whose place in the order is `place`, of head 0. Of tiles that are equally long and in pieces all first
// pieces come first.
template <class Config, class Params>
__device__ __forceinline__ void write_rows(const Params& params, const OrderedTile& tile, const Arrangement& arrangement,
                                           const int* begins, int place) {
  int4* items = static_cast<int4*>(params.items);
  const int in_pieces = place - arrangement.num_whole;
  const bool is_whole = in_pieces < 0;
  const int pieces = is_whole ? 1 : arrangement.pieces;
  const int num_steps = (tile.kv_stop - tile.kv_begin + Config::kTokens - 1) / Config::kTokens;
  const int stride = (num_steps + pieces - 1) / pieces * Config::kTokens;
  const int first_equal = max(begins[tile.bin], arrangement.num_whole), num_equal = begins[tile.bin + 1] - first_equal;
  const int first_slot = in_pieces * Config::kHeads * pieces;
  for (int piece = 0; piece < pieces; ++piece) {
    const int begin = min(tile.kv_begin + piece * stride, tile.kv_stop);
    const int end = is_whole ? tile.kv_stop : min(begin + stride, tile.kv_stop);
    int at = place;
    if (!is_whole) {
      at = arrangement.num_whole + place_in_rounds(begins, arrangement, tile.bin, piece * num_equal + place - first_equal);
    }
    int4* row = items + static_cast<int64>(at) * 4;
    row[0] = {tile.request, 0, tile.q_tile, 0};
    row[1] = {begin, end, is_whole ? -1 : first_slot + piece, 0};
    row[2] = {tile.q_begin, tile.q_len, tile.kv_len, is_whole ? -1 : in_pieces * Config::kHeads};
    row[3] = is_whole ? int4{} : int4{first_slot, first_slot + 1, first_slot + pieces, pieces};
  }
}

template <class Config, class Params>
__device__ __forceinline__ void attention_order(const Params& params) {
  constexpr int kWarps = Config::kNumThreads / 32;
  static_assert(Config::kNumThreads >= kOrderBins);
  __shared__ int counts[kWarps][kOrderBins];
  __shared__ int begins[kOrderBins + 1];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  for (int idx = thread; idx < kWarps * kOrderBins; idx += Config::kNumThreads) counts[idx / kOrderBins][idx % kOrderBins] = 0;
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
  const Arrangement arrangement = arrange<Config>(begins, num_pairs);
  if (thread == 0) {
    const int num_rows = arrangement.num_whole + (num_pairs - arrangement.num_whole) * arrangement.pieces;
    *static_cast<OrderHeader*>(params.header) = {num_rows, arrangement.is_used, 0, 0};
  }
  if (!arrangement.is_used) return;
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
    write_rows<Config>(params, tile, arrangement, begins, place);
  }
}

}  // namespace fi
