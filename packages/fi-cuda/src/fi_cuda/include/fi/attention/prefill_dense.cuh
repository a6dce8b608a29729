// Dense copies of gathered keys and values. Copying a step's rows one by one holds up exponentials and products, whose instructions wait
// in the same queue, more than the copy engine's few boxes do, and each tile of a long query would do it for the same keys. So one tile
// of each request and KV head (dense_tile_of) leaves what it gathered in global memory,
// as it lies in shared memory, and tiles that begin after its end read that. The bytes are the same, so results do not depend on
// which tiles do.
//
// Each producing warp works for itself: it keeps its rows of every step, and reads what the same warp of another block kept. Nobody
// waits: what is not there yet, or has no room, is gathered. A copy is valid in the launch that made it; each launch has a number.
#pragma once

#include "fi/attention/order.cuh"
#include "fi/attention/prefill_tiles.cuh"
#include "fi/ptx/fence.cuh"
#include "fi/ptx/relaxed.cuh"

namespace fi {

// What copies of a producing warp have in common.
struct alignas(16) DenseHeader {
  unsigned long long launches;  // before this one
  int used;                     // steps of the room for copies; 0 between launches
  int ended;                    // blocks; 0 between launches
};

// The headers of all producing warps, and for each request and KV head a record a warp: the first step of its copy, and from bit
// kDenseStepBits on the number of the launch, counted from 1.
constexpr int kDenseWarps = kWarpgroupThreads / kWarpThreads;
constexpr int kDenseStepBits = 24;

template <class Params>
__device__ __forceinline__ DenseHeader& dense_header(const Params& params) {
  return static_cast<DenseHeader*>(params.dense_records)[thread_anew() / kWarpThreads];
}
// `owner`: a request and KV head.
template <class Params>
__device__ __forceinline__ unsigned long long* dense_record(const Params& params, int owner) {
  auto* records = reinterpret_cast<unsigned long long*>(static_cast<DenseHeader*>(params.dense_records) + kDenseWarps);
  return records + static_cast<int64>(owner) * kDenseWarps + thread_anew() / kWarpThreads;
}

// The tile of a request that leaves a copy: the last full one, which sees nearly all keys and comes early in the order; without a causal
// mask the first one. None (-1) for requests of fewer full tiles than kDenseTiles.
template <class Config>
__device__ __forceinline__ int dense_tile_of(int q_len) {
  const int full_tiles = q_len / PrefillTile<Config>::kTileTokens;
  if (full_tiles < Config::kDenseTiles) return -1;
  return Config::kCausal ? full_tiles - 1 : 0;
}

// What an item has to do with the copy of its request's keys and values.
template <class Config>
struct DensePlace {
  unsigned step = 0;  // of the room for copies, where the item's first one is kept or read
  int owner = 0, end = 0;  // where rows end that are kept
  bool is_kept = false, is_read = false;

  // `ahead`: what was found before; is_worth(): whether a copy is faster than what it is made of.
  template <class Params, class IsWorth>
  __device__ __forceinline__ DensePlace(const Params& params, const AttentionItem& item, const ItemSteps<Config>& steps,
                                        const DenseAhead& ahead, IsWorth is_worth) {
    constexpr int kTokens = Config::kTokens;
    const int tile = dense_tile_of<Config>(item.q_len);
    if (tile < 0 || steps.num_steps == 0) return;
    owner = item.request * params.num_kv_heads + item.kv_head;
    if (item.q_tile == tile) {
      if (item.slot >= 0 || item.kv_begin > 0 || !is_worth()) return;
      int at = 0;
      if (thread_anew() % kWarpThreads == 0) at = atomicAdd(&dense_header(params).used, steps.num_steps);
      at = __shfl_sync(0xffffffffu, at, 0);
      is_kept = at + steps.num_steps <= params.dense_steps;
      step = at;
      return;
    }
    end = Config::kCausal ? item.offset() + (tile + 1) * PrefillTile<Config>::kTileTokens : item.kv_len;
    const int kept_last = (end - 1) / kTokens * kTokens;  // position of the kept item's first step
    is_read = ahead.record != 0 && ahead.owner == owner && steps.last <= kept_last && steps.last % kTokens == 0;
    step = static_cast<unsigned>(ahead.record & ((1u << kDenseStepBits) - 1)) + (kept_last - steps.last) / kTokens;
    end = min(end, item.kv_end);
  }
};

// The record of an owner's copy, 0 where there is none of this launch yet. All lanes call it; what was kept may be read afterwards.
template <class Params>
__device__ __forceinline__ unsigned long long find_dense(const Params& params, int owner) {
  const unsigned long long number = ptx::load_relaxed(&dense_header(params).launches) + 1;
  const unsigned long long record = __shfl_sync(0xffffffffu, ptx::load_acquire(dense_record(params, owner)), 0);
  if (record >> kDenseStepBits != number) return 0;
  ptx::fence_proxy_async();  // what was kept came through the copy engine, and is read by it
  __syncwarp();
  return record;
}

// By the thread that stored a copy, once it is written; `step`: its first one.
template <class Params>
__device__ __forceinline__ void publish_dense(const Params& params, int owner, unsigned step) {
  const unsigned long long number = ptx::load_relaxed(&dense_header(params).launches) + 1;
  ptx::fence_proxy_async();
  ptx::store_release(dense_record(params, owner), number << kDenseStepBits | step);
}

// The end of a producing warp's list: the last block's makes place for the next launch.
template <class Params>
__device__ __forceinline__ void end_dense_copies(const Params& params) {
  if (thread_anew() % kWarpThreads != 0) return;
  DenseHeader& header = dense_header(params);
  if (atomicAdd(&header.ended, 1) != static_cast<int>(gridDim.x) - 1) return;
  header.used = 0;
  header.ended = 0;
  atomicAdd(&header.launches, 1ull);
}

}  // namespace fi
