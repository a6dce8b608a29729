// The work list of an attention step, filled on the GPU from lengths that lie there: fi-scheduler's partition, bit for bit.
//
// Every block sums up the requests' costs and finds all workers' cuts, a thread each, which takes as long as finding one;
// then a warp writes the rows of one worker, and blocks share the workers. So blocks need nothing of each other.
// A batch that exceeds the limits, or with negative lengths, has no work: no row is ever written past the buffers that were
// derived from the same capacity, and none names a token past it. The limits also bound every cost, which is why a
// kernel for small ones may count in 32 bits (FI_PARTITION_INT).
// Config: partition() (constant but for the window), kSharedRequests (requests that the tables in shared memory hold; 0:
// they lie in `scratch`), kWorkersPerBlock, kNumThreads.
// Params: q_indptr int [num_requests + 1], kv_lens int [num_requests]; scratch (see PlanTables); starts int [workers, 32],
// items int [., 16] (fi/attention/item.cuh), worker_indptr int [workers + 1], merges int [., 8], num_merges int [1];
// max_tiles, max_q_tokens, max_q_len, max_kv_len; num_requests, window.
#pragma once

#include "fi/attention/order.cuh"
#include "fi/attention/work_rows.cuh"
#include "fi/ptx/dependent_launch.cuh"
#include "fi/tile/scan.cuh"

namespace fi {

// What a block knows of the requests, in one stretch of memory: four arrays of Int [capacity + 1], then the lengths.
// Blocks that keep them in global memory share one stretch, so nothing but final values may be written: these are the same
// for all blocks, and a block reads its own or equal ones.
struct PlanTables {
  plan::Prefixes before;
  int* q_indptr;
  int* kv_lens;

  __device__ __forceinline__ PlanTables(void* memory, int capacity) {
    const plan::Int size = capacity + 1;
    plan::Int* sums = static_cast<plan::Int*>(memory);
    before = {sums, sums + size, sums + 2 * size, sums + 3 * size};
    q_indptr = reinterpret_cast<int*>(sums + 4 * size);
    kv_lens = q_indptr + size;
  }
};

// Neighbouring requests in a thread's registers: lengths, and what each adds to the prefix sums. Past the last request
// stand requests without tokens, which add nothing.
template <class Config, class Params, int kCount>
struct OwnRequests {
  static constexpr int kSums = Config::partition().max_splits > 0 ? 4 : Config::kShortOnly ? 3 : 2;

  int q_indptr[kCount + 1];
  int kv_lens[kCount];
  plan::Int totals[kCount][kSums];

  // Loads first, all in flight at once.
  __device__ __forceinline__ OwnRequests(const Params& params, plan::Line line, int first) {
#pragma unroll
    for (int idx = 0; idx <= kCount; ++idx) {
      q_indptr[idx] = static_cast<const int*>(params.q_indptr)[min(first + idx, params.num_requests)];
    }
#pragma unroll
    for (int idx = 0; idx < kCount; ++idx) {
      kv_lens[idx] = 0;
      if (first + idx < params.num_requests) kv_lens[idx] = static_cast<const int*>(params.kv_lens)[first + idx];
    }
    line.q_indptr = q_indptr;
    line.kv_lens = kv_lens;
#pragma unroll
    for (int idx = 0; idx < kCount; ++idx) {
      // Counting goes from tile to tile, so a length beyond the limits would keep it busy for minutes.
      const plan::Totals own = is_within_limits(params, idx) ? plan::totals_of(line, idx) : plan::Totals{};
      totals[idx][0] = own.cost;
      totals[idx][1] = own.tiles;
      if constexpr (kSums == 4) {
        totals[idx][2] = own.items;
        totals[idx][3] = own.merges;
      }
      if constexpr (kSums == 3) totals[idx][2] = is_within_limits(params, idx) ? long_tiles(idx) : plan::Int{0};
    }
  }

  __device__ __forceinline__ bool is_within_limits(const Params& params, int idx) const {
    const int begin = q_indptr[idx], end = q_indptr[idx + 1];
    return 0 <= begin && begin <= end && end <= params.max_q_tokens && end - begin <= params.max_q_len
        && 0 <= kv_lens[idx] && kv_lens[idx] <= params.max_kv_len;
  }

  // What the request's tiles of the prefill kernel weigh.
  __device__ __forceinline__ plan::Int long_tiles(int idx) const {
    const int q_len = q_indptr[idx + 1] - q_indptr[idx];
    return plan::ceil_div(q_len, Config::kTileTokens) * weight_of_tile<Config>(q_len);
  }

  __device__ __forceinline__ bool within_limits(const Params& params) const {
    bool within = true;
#pragma unroll
    for (int idx = 0; idx < kCount; ++idx) within &= is_within_limits(params, idx);
    return within;
  }
};

constexpr int kMaxOwnRequests = 4;  // that a thread keeps, rather than fetch them again for the second pass

// Fills the tables: a thread sums up its share of neighbouring requests, the block scans, the thread adds what is before.
// Returns the cost of all requests for one head, 0 unless the batch is within the limits.
template <class Config, class Params>
__device__ __forceinline__ plan::Int sum_requests(const Params& params, const PlanTables& tables, const plan::Line& line) {
  constexpr int kThreads = Config::kNumThreads, kWarps = kThreads / 32;
  constexpr int kShare = (Config::kSharedRequests + kThreads - 1) / kThreads;
  constexpr bool kOnce = kShare > 0 && kShare <= kMaxOwnRequests;
  constexpr int kCount = kOnce ? kShare : 2;
  using Own = OwnRequests<Config, Params, kCount>;
  constexpr int kSums = Own::kSums;
  __shared__ plan::Int warp_sums[kSums][kWarps];
  const int num_requests = params.num_requests;
  const int share = kOnce ? kCount : (num_requests + kThreads * kCount - 1) / (kThreads * kCount) * kCount;
  const int begin = static_cast<int>(threadIdx.x) * share;
  plan::Int* const prefixes[4] = {tables.before.cost, tables.before.tiles, tables.before.items, tables.before.merges};

  plan::Int mine[kSums] = {};
  bool within = true;
  int end_of_share = 0;  // the last thread's is q_indptr[num_requests]
  const auto add_up = [&](const Own& own, int first) {
    within &= own.within_limits(params);
    end_of_share = own.q_indptr[kCount];
#pragma unroll
    for (int idx = 0; idx < kCount; ++idx) {
      if (first + idx < num_requests) {
        tables.q_indptr[first + idx] = own.q_indptr[idx];
        tables.kv_lens[first + idx] = own.kv_lens[idx];
      }
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) mine[sum] += own.totals[idx][sum];
    }
  };
  plan::Int before[kSums], all[kSums] = {};
  const auto place = [&](const Own& own, int first) {
#pragma unroll
    for (int idx = 0; idx < kCount; ++idx) {
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) {
        if (first + idx < num_requests) prefixes[sum][first + idx] = before[sum];
        before[sum] += own.totals[idx][sum];
      }
    }
  };
  const auto scan = [&] {
    const int warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) {
      const plan::Int inclusive = inclusive_sum_over_lanes<32>(mine[sum]);
      before[sum] = inclusive - mine[sum];
      if (threadIdx.x % 32 == 31) warp_sums[sum][warp] = inclusive;
    }
    within = __syncthreads_and(within);
#pragma unroll
    for (int idx = 0; idx < kWarps; ++idx) {
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) {
        if (idx == warp) before[sum] += all[sum];
        all[sum] += warp_sums[sum][idx];
      }
    }
  };
  if constexpr (kOnce) {
    const Own own(params, line, begin);
    add_up(own, begin);
    scan();
    place(own, begin);
  } else {
#pragma unroll 1
    for (int first = begin; first < begin + share; first += kCount) add_up(Own(params, line, first), first);
    scan();
#pragma unroll 1
    for (int first = begin; first < begin + share; first += kCount) place(Own(params, line, first), first);
  }
  if (threadIdx.x == kThreads - 1) {
    tables.q_indptr[num_requests] = end_of_share;
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) prefixes[sum][num_requests] = all[sum];
  }
  __syncthreads();
  if constexpr (kSums == 3) within &= all[2] * line.params.num_kv_heads <= Config::kMostShort;
  return within && all[1] * line.params.num_kv_heads <= params.max_tiles ? all[0] : 0;
}

// What the cuts up to `worker`'s say, counted by a warp; batch-invariant cuts say it themselves.
template <class Config>
__device__ __forceinline__ plan::Place place_of(const plan::Cut* cuts, int worker) {
  plan::Place place = {0, 0, 0};
  if constexpr (Config::partition().max_splits > 0) return place;
  constexpr int kWorkers = static_cast<int>(Config::partition().num_workers);
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int base = 0; base <= kWorkers; base += 32) {
    const int idx = base + lane;
    const bool counted = idx > 0 && idx <= worker;  // the line's start is in no tile
    const unsigned inside = __ballot_sync(0xffffffffu, counted && cuts[idx].inner > 0);
    const unsigned first = __ballot_sync(0xffffffffu, counted && plan::is_first_inside(cuts[idx], cuts[idx - 1]));
    place.continuing += __popc(inside);
    place.split_tiles += __popc(first);
    if (first != 0) place.last_first = base + 31 - __clz(first);
  }
  return place;
}

// The rows of one worker, by a warp; of the end of the line, the ends of the lists.
template <class Config, class Params>
__device__ __forceinline__ void write_worker(
    const Params& params, const plan::Line& line, const plan::Cut* cuts, plan::Cursor& cursor, int worker, bool has_work) {
  constexpr int kWorkers = static_cast<int>(Config::partition().num_workers);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const plan::Place place = place_of<Config>(cuts, worker);
  const plan::Int begin = place.first_item(line, cuts[worker]);
  const plan::Int merge_idx = place.first_merge(line, cuts[worker]);
  if (lane == 0) static_cast<int*>(params.worker_indptr)[worker] = static_cast<int>(begin);
  if (worker == kWorkers) {
    if (lane == 0) *static_cast<int*>(params.num_merges) = static_cast<int>(merge_idx);
    return;
  }
  const plan::Cut& next = cuts[worker + 1];
  const plan::Int end = plan::Place{place.continuing + (next.inner > 0), 0, 0}.first_item(line, next);
  plan::Quad* start_row = static_cast<plan::Quad*>(params.starts) + worker * plan::kStartQuads;
  if (lane == 0) start_row[0] = plan::quad(begin, end, 0, 0);
  if (!has_work) return;
  plan::RowWriter rows = {line, static_cast<plan::Quad*>(params.items), static_cast<plan::Quad*>(params.merges), start_row,
                          worker, lane, 32, place.last_first, begin, merge_idx, false};
  if (plan::items_follow_from_cuts(line.params)) {
    plan::write_items(rows, cuts[worker], next, end - begin);
  } else {
    plan::emit_worker(line, cursor, worker, rows);
  }
}

template <class Config, class Params>
__device__ __forceinline__ void attention_plan(const Params& params) {
  constexpr int kWorkers = static_cast<int>(Config::partition().num_workers);
  constexpr int kPerBlock = Config::kWorkersPerBlock;
  static_assert(kPerBlock * 32 <= Config::kNumThreads, "a warp for each worker of the block");
  extern __shared__ plan::Int shared_tables[];
  __shared__ plan::Cut cuts[kWorkers + 1];
  __shared__ plan::Cursor cursors[kPerBlock];
  constexpr bool kShared = Config::kSharedRequests > 0;
  const PlanTables tables = kShared ? PlanTables(shared_tables, Config::kSharedRequests)
                                    : PlanTables(params.scratch, params.num_requests);
  plan::Line line = {Config::partition(), tables.q_indptr, tables.kv_lens, params.num_requests, 0, tables.before.cost,
                     tables.before.tiles};
  if (Config::partition().window != plan::kNoWindow) line.params.window = params.window;

  ptx::allow_next_kernel();  // which waits for the end of this one
  ptx::wait_for_previous_kernel();
  line.total_cost = sum_requests<Config>(params, tables, line) * line.params.num_kv_heads;
  const bool has_work = line.total_cost > 0;
  line.params.num_workers = plan::num_sharing(line);

  const int first_worker = static_cast<int>(blockIdx.x) * kPerBlock;
#pragma unroll 1
  for (int worker = threadIdx.x; worker <= kWorkers; worker += Config::kNumThreads) {
    plan::Cut cut = {0, 0, 0, 0};
    const bool shares = worker < line.params.num_workers;
    if (has_work && !shares) cut = plan::last_cut(line, tables.before);
    if (has_work && shares) {
      const plan::Int position = plan::worker_begin(line, worker);
      const plan::Cursor cursor = plan::seek(line, position);
      cut = plan::cut_at(line, tables.before, cursor, position);
      const int own = worker - first_worker;
      if (!plan::items_follow_from_cuts(line.params) && own >= 0 && own < kPerBlock) cursors[own] = cursor;
    }
    cuts[worker] = cut;
  }
  __syncthreads();
  const int own = static_cast<int>(threadIdx.x / 32), worker = first_worker + own;
  if (own < kPerBlock && worker <= kWorkers) {
    plan::Cursor cursor = cursors[own];
    write_worker<Config>(params, line, cuts, cursor, worker, has_work && worker < line.params.num_workers);
  }
}

}  // namespace fi
