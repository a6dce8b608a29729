// The list of tiles of a batch whose requests share prefixes, filled on the GPU from lengths and nodes that lie there.
//
// One block. Requests stand in the order of the forest, so the query tokens of a node are a stretch of one list of tokens. Only
// requests whose tokens fit one tile take part: longer ones read their keys once for a whole tile anyway. A node that a single
// request uses, or that is not what SharedPrefixes says, is left to its members, as are the nodes within it.
// Nodes' tiles are cut into pieces of equal length, of which a list schedule of cost-model lengths ends first; requests' own
// keys are cut where one tile would take more than a quarter of the step. So long pieces come first and the short rest fills up.
// A batch beyond the limits, or with negative lengths, has no tiles, and nothing is written past buffers of the same capacity.
// Config: kNumThreads, kTileTokens, kGroupTokens, kConsumers, kGroupSize, kTokens (keys a step), kAlign (a piece's first key is a
// multiple), kCausal, kHeads (KV heads), kWorkers, kItemCost, kNodeItemCost, kStepCost, kGroupCost (of a further warpgroup's rows),
// kSlices (warpgroups that share a step's keys where one has all rows of a request's tile) and kSliceCost (of such a step).
// kSharedNodes and kSharedRequests (that tables in shared memory hold; 0: they lie in `scratch`).
// Params: q_indptr, kv_lens, nodes int [num_nodes, 4], order int [num_requests] or null; scratch (see PrefixTables); rows int [., 16], header, tokens int [max_q_tokens], segments
// [., max_segments]; limits; num_requests, num_nodes.
#pragma once

#include "fi/attention/prefix_plan.cuh"
#include "fi/ptx/dependent_launch.cuh"

namespace fi {

template <class Config, class Params>
class PrefixPlanner {
  static constexpr int kThreads = Config::kNumThreads;
  static constexpr int kCandidates = 64;  // numbers of pieces of the longest node
  static constexpr int kQueryHeads = Config::kHeads * Config::kGroupSize;
  static constexpr int kShare = 4;  // of the time of a step that a tile of a request's own keys may take
  static constexpr int kLeastOwnSteps = 2;

 public:
  __device__ __forceinline__ PrefixPlanner(const Params& params, PrefixSums& sums, const PrefixTables& tables)
      : params_(params), sums_(sums), thread_(static_cast<int>(threadIdx.x)),
        q_indptr_(static_cast<const int*>(params.q_indptr)), kv_lens_(static_cast<const int*>(params.kv_lens)),
        order_(static_cast<const int*>(params.order)), given_(static_cast<const PrefixNode*>(params.nodes)),
        tokens_before_(tables.place_tokens), members_before_(tables.place_members), nodes_(tables.nodes),
        requests_(tables.requests) {}

  __device__ __forceinline__ void run() {
    PrefixHeader* header = static_cast<PrefixHeader*>(params_.header);
    if (thread_ == 0) sums_ = {0, 0, ~0ull, 0, 0, 0, 0};
    if (!place_tokens()) {
      if (thread_ == 0) *header = {};
      return;
    }
    find_parents();
    find_used_nodes();
    assign_requests();
    choose_pieces();
    int rows[3] = {};  // of the list, of parts, merged tokens
    place_rows(rows);
    if (thread_ == 0) *header = {rows[0], rows[2], 0, 0};
    write_node_rows();
    write_request_rows(rows[0]);
    write_segments(rows[2]);
  }

 private:
  __device__ __forceinline__ int request_at(int place) const { return order_ == nullptr ? place : order_[place]; }
  __device__ __forceinline__ int q_len(int request) const { return q_indptr_[request + 1] - q_indptr_[request]; }
  __device__ __forceinline__ bool is_node(const PrefixNode& node) const {
    return 0 <= node.member_begin && node.member_begin < node.member_end && node.member_end <= params_.num_requests &&
           0 <= node.kv_begin && node.kv_begin < node.kv_end && node.kv_end <= params_.max_kv_len;
  }
  static __device__ __forceinline__ bool contains(const PrefixNode& outer, const PrefixNode& inner) {
    return outer.member_begin <= inner.member_begin && inner.member_end <= outer.member_end;
  }

  // The list of tokens, and what stands before each place of the order; whether the batch is within the limits.
  __device__ __forceinline__ bool place_tokens() {
    const int count = params_.num_requests;
    bool within = true;
    for (int request = thread_; request < count; request += kThreads) {
      const int begin = q_indptr_[request], end = q_indptr_[request + 1], kv_len = kv_lens_[request];
      within &= 0 <= begin && begin <= end && end <= params_.max_q_tokens && end - begin <= params_.max_q_len;
      within &= 0 <= kv_len && kv_len <= params_.max_kv_len;
      requests_[request] = {0, -1, 0, 1, 0, 0, 0, 0};
      if (order_ != nullptr) within &= 0 <= order_[request] && order_[request] < count;
    }
    if (!__syncthreads_and(within)) return false;
    int total[2] = {};
    scan_over<kThreads>(
        count, total,
        [&](int place, int(&own)[2]) {
          const int length = q_len(request_at(place));
          own[1] = length > 0 && length <= Config::kTileTokens;
          own[0] = own[1] ? length : 0;
        },
        [&](int place, const int(&before)[2], const int(&own)[2]) {
          const int request = request_at(place), begin = q_indptr_[request];
          tokens_before_[place] = before[0];
          members_before_[place] = before[1];
          requests_[request].t_begin = before[0];
          int* tokens = static_cast<int*>(params_.tokens) + before[0];
          if (before[0] + own[0] > params_.max_q_tokens) return;  // an order that is no permutation
          for (int idx = 0; idx < own[0]; ++idx) tokens[idx] = begin + idx;
        });
    if (thread_ == 0) {
      tokens_before_[count] = total[0];
      members_before_[count] = total[1];
    }
    __syncthreads();
    return total[0] <= params_.max_q_tokens;
  }

  __device__ __forceinline__ void find_parents() {
    for (int idx = thread_; idx < params_.num_nodes; idx += kThreads) {
      const PrefixNode node = given_[idx];
      NodeWork work = {};
      work.parent = -1;
      if (is_node(node)) {
        int begin = 0;
        for (int other = 0; other < idx; ++other) {
          const PrefixNode outer = given_[other];
          if (is_node(outer) && contains(outer, node)) {
            work.parent = other;
            begin = outer.kv_end;
          }
        }
        const int members = members_before_[node.member_end] - members_before_[node.member_begin];
        work.t_begin = tokens_before_[node.member_begin];
        work.num_tokens = tokens_before_[node.member_end] - work.t_begin;
        work.kv_first = node.kv_begin;
        work.kv_end = node.kv_end;
        work.request = request_at(node.member_begin);
        work.fits = members > 1 && node.kv_begin == begin;
      }
      nodes_[idx] = work;
    }
    __syncthreads();
  }

  // Sets `pieces` to 1 for the nodes that are used: what is around them is too. Sums up their cost.
  __device__ __forceinline__ void find_used_nodes() {
    for (int idx = thread_; idx < params_.num_nodes; idx += kThreads) {
      bool used = true;
      int depth = 0;
      for (int node = idx; node >= 0 && used; node = nodes_[node].parent) used = nodes_[node].fits && ++depth < params_.max_segments;
      if (!used) continue;
      NodeWork& work = nodes_[idx];
      work.pieces = 1;
      atomicMax(&sums_.longest_node, steps_from<Config>(work.kv_first, work.kv_end));
    }
    __syncthreads();
  }

  __device__ __forceinline__ void assign_requests() {
    unsigned long long cost = 0;
    int longest = 0;
    for (int place = thread_; place < params_.num_requests; place += kThreads) {
      const int request = request_at(place), length = q_len(request);
      RequestWork& work = requests_[request];
      if (length > 0 && length <= Config::kTileTokens) {
        for (int idx = 0; idx < params_.num_nodes; ++idx) {
          if (nodes_[idx].pieces > 0 && given_[idx].member_begin <= place && place < given_[idx].member_end) work.node = idx;
        }
        if (work.node >= 0) work.own_first = nodes_[work.node].kv_end;
      }
      const int steps = steps_from<Config>(work.own_first, kv_lens_[request]);
      longest = max(longest, steps);
      const int64 step_cost = slices_of(length, steps) > 1 ? Config::kSliceCost : step_cost_of_all<Config>(length);
      cost += tiles_of(length, Config::kTileTokens) * static_cast<int64>(Config::kItemCost) + steps * step_cost;
    }
    if (cost > 0) atomicAdd(&sums_.own_cost, cost);
    atomicMax(&sums_.longest_own, longest);
    __syncthreads();
  }

  // Pieces of a node of which none has more than `chunk` steps.
  static __device__ __forceinline__ int pieces_of(const NodeWork& work, int chunk) {
    return (steps_from<Config>(work.kv_first, work.kv_end) + chunk - 1) / chunk;
  }

  // The longest piece of which a list schedule ends first, and from that how long requests' own pieces may be.
  __device__ __forceinline__ void choose_pieces() {
    const int longest = sums_.longest_node;
    for (int candidate = thread_; candidate < kCandidates && longest > 0; candidate += kThreads) {
      const int chunk = (longest + candidate) / (candidate + 1);
      int64 tiles = 0, parts = 0, cost = sums_.own_cost;
      int64 slowest = 0;
      for (int idx = 0; idx < params_.num_nodes; ++idx) {
        const NodeWork& work = nodes_[idx];
        if (work.pieces == 0) continue;
        const int steps = steps_from<Config>(work.kv_first, work.kv_end), pieces = (steps + chunk - 1) / chunk;
        const int64 own = static_cast<int64>(tiles_of(work.num_tokens, Config::kTileTokens)) * pieces;
        tiles += own;
        parts += static_cast<int64>(work.num_tokens) * pieces;
        cost += own * Config::kNodeItemCost + steps * step_cost_of_all<Config>(work.num_tokens);
        slowest = max(slowest, static_cast<int64>(step_cost<Config>(min(work.num_tokens, Config::kTileTokens))));
      }
      const int64 rounds = (tiles * Config::kHeads + Config::kWorkers - 1) / Config::kWorkers;
      const int64 alone = rounds * (chunk * slowest + Config::kNodeItemCost);
      const int64 even = cost * Config::kHeads / Config::kWorkers;
      const bool fits = candidate == 0 || (tiles <= params_.max_node_rows && parts <= params_.max_node_tokens);
      if (fits) atomicMin(&sums_.best, static_cast<unsigned long long>(max(alone, even)) << 8 | static_cast<unsigned>(candidate));
    }
    __syncthreads();
    const int64 even = sums_.own_cost * Config::kHeads / Config::kWorkers;
    const int64 time = longest > 0 ? static_cast<int64>(sums_.best >> 8) : even;
    const int pieces = static_cast<int>(sums_.best & 255) + 1;
    for (int idx = thread_; idx < params_.num_nodes && longest > 0; idx += kThreads) {
      if (nodes_[idx].pieces > 0) nodes_[idx].pieces = pieces_of(nodes_[idx], (longest + pieces - 1) / pieces);
    }
    if (thread_ == 0) {
      const int64 chunk = time / (kShare * Config::kStepCost);
      sums_.own_chunk = static_cast<int>(max(min(chunk, static_cast<int64>(sums_.longest_own)), static_cast<int64>(kLeastOwnSteps)));
    }
    __syncthreads();
  }

  // Warpgroups that share the keys of a request's own steps.
  static __device__ __forceinline__ int slices_of(int num_tokens, int steps) {
    return Config::kSlices > 1 && num_tokens <= Config::kGroupTokens && steps > 0 ? Config::kSlices : 1;
  }
  __device__ __forceinline__ int slices_of(int request) const {
    return slices_of(q_len(request), steps_from<Config>(requests_[request].own_first, kv_lens_[request]));
  }

  __device__ __forceinline__ int own_pieces(int request, int chunk) const {
    return max((steps_from<Config>(requests_[request].own_first, kv_lens_[request]) + chunk - 1) / chunk, 1);
  }

  // Places of rows, parts and merged tokens; requests' keys have longer pieces, up to whole ones, if those would not fit.
  __device__ __forceinline__ void place_rows(int (&total)[3]) {
    scan_over<kThreads>(
        params_.num_nodes, total,
        [&](int idx, int(&own)[3]) {
          const NodeWork& work = nodes_[idx];
          own[0] = tiles_of(work.num_tokens, Config::kTileTokens) * work.pieces;
          own[1] = work.num_tokens * work.pieces * kQueryHeads;
        },
        [&](int idx, const int(&before)[3], const int(&own)[3]) {
          nodes_[idx].first_row = before[0];
          nodes_[idx].first_part = before[1];
        });
    if (thread_ == 0) sums_.node_parts = total[0];
    int chunk = sums_.own_chunk;
    const auto rows_of = [&](int request, int(&own)[3]) {
      const int length = q_len(request), pieces = own_pieces(request, chunk), slices = slices_of(request);
      own[0] = tiles_of(length, Config::kTileTokens) * pieces;
      if (pieces * slices == 1 && requests_[request].node < 0) return;
      own[1] = length * pieces * slices * kQueryHeads;
      own[2] = length;
    };
    bool fits = false;
    while (!fits) {
      int tried[3] = {total[0], total[1], 0};
      scan_over<kThreads>(params_.num_requests, tried, rows_of, [](int, const int(&)[3], const int(&)[3]) {});
      fits = (tried[0] <= params_.max_rows && tried[1] <= params_.max_parts) || chunk > sums_.longest_own;
      if (!fits) chunk *= 2;
    }
    scan_over<kThreads>(
        params_.num_requests, total, rows_of, [&](int request, const int(&before)[3], const int(&own)[3]) {
          RequestWork& work = requests_[request];
          work.pieces = own_pieces(request, chunk);
          work.first_row = before[0];
          work.first_part = own[2] > 0 ? before[1] : -1;
          work.first_merged = before[2];
        });
    if (thread_ == 0) sums_.own_chunk = chunk;
    __syncthreads();
  }

  __device__ __forceinline__ void write_row(int place, int request, int q_tile, int kind, int kv_begin, int kv_end, int slot,
                                            int kv_first, int q_begin, int num_tokens, int kv_len, int slices) const {
    int4* row = static_cast<int4*>(params_.rows) + static_cast<int64>(place) * 4;
    row[0] = {request, 0, q_tile, kind};
    row[1] = {kv_begin, kv_end, slot, kv_first};
    row[2] = {q_begin, num_tokens, kv_len, -1};
    row[3] = {0, 0, 0, slices};
  }

  // Tiles of one piece side by side: they read the same keys.
  __device__ __forceinline__ void write_node_rows() const {
    const int longest = sums_.longest_node;
    if (longest == 0) return;
    const int count = static_cast<int>(sums_.best & 255) + 1, chunk = (longest + count - 1) / count * Config::kTokens;
    for (int place = thread_; place < sums_.node_parts; place += kThreads) {
      const int idx = last_at_most(nodes_, &NodeWork::first_row, params_.num_nodes, place);
      const NodeWork& work = nodes_[idx];
      const int tiles = tiles_of(work.num_tokens, Config::kTileTokens), inside = place - work.first_row;
      const int piece = inside / tiles, begin = work.kv_first / Config::kAlign * Config::kAlign + piece * chunk;
      write_row(place, work.request, inside % tiles, kNodeItem, begin, min(begin + chunk, work.kv_end),
                work.first_part + piece * work.num_tokens * kQueryHeads, work.kv_first, work.t_begin, work.num_tokens,
                work.kv_end + work.num_tokens, 1);
    }
  }

  __device__ __forceinline__ void write_request_rows(int num_rows) const {
    const int chunk = sums_.own_chunk;
    for (int place = sums_.node_parts + thread_; place < num_rows; place += kThreads) {
      const int request = last_at_most(requests_, &RequestWork::first_row, params_.num_requests, place);
      const RequestWork& work = requests_[request];
      const int length = q_len(request), kv_len = kv_lens_[request], tiles = tiles_of(length, Config::kTileTokens);
      const int inside = place - work.first_row, piece = inside / tiles, q_tile = inside % tiles;
      const int offset = kv_len - length, last = min((q_tile + 1) * Config::kTileTokens, length);
      const int stop = Config::kCausal ? max(offset + last, 0) : kv_len;
      const int begin = work.own_first / Config::kAlign * Config::kAlign;
      const bool whole = work.pieces == 1;
      const int piece_begin = min(begin + piece * chunk * (whole ? 0 : Config::kTokens), max(stop, begin));
      const int piece_end = whole ? stop : min(piece_begin + chunk * Config::kTokens, stop);
      const int slices = slices_of(request);
      const int slot = work.first_part < 0 ? -1 : work.first_part + piece * slices * length * kQueryHeads;
      write_row(place, request, q_tile, kRequestItem, piece_begin, max(piece_end, piece_begin), slot, work.own_first,
                q_indptr_[request], length, kv_len, slices);
    }
  }

  // The request's own parts, then those of the nodes around it, from the inside.
  __device__ __forceinline__ void write_segments(int num_merged) const {
    for (int place = thread_; place < num_merged; place += kThreads) {
      const int request = last_at_most(requests_, &RequestWork::first_merged, params_.num_requests, place);
      const RequestWork& work = requests_[request];
      const int length = q_len(request), inside = place - work.first_merged, token = q_indptr_[request] + inside;
      PartSegment* segment = static_cast<PartSegment*>(params_.segments) + static_cast<int64>(place) * params_.max_segments;
      PartSegment* const end = segment + params_.max_segments;
      *segment++ = {work.first_part + inside * Config::kGroupSize, length * Config::kGroupSize, work.pieces * slices_of(request), token};
      const int position = kv_lens_[request] - length + inside;
      for (int idx = work.node; idx >= 0; idx = nodes_[idx].parent) {
        const NodeWork& node = nodes_[idx];
        const int row = work.t_begin + inside - node.t_begin;
        *segment++ = {node.first_part + row * Config::kGroupSize, node.num_tokens * Config::kGroupSize, node.pieces,
                      node.kv_end + row - position};
      }
      if (segment < end) *segment = {};
    }
  }

  const Params& params_;
  PrefixSums& sums_;
  const int thread_;
  const int *q_indptr_, *kv_lens_, *order_;
  const PrefixNode* given_;
  int *tokens_before_, *members_before_;
  NodeWork* nodes_;
  RequestWork* requests_;
};

template <class Config, class Params>
__device__ __forceinline__ void attention_prefix_plan(const Params& params) {
  extern __shared__ __align__(16) unsigned char shared_tables[];
  __shared__ PrefixSums sums;
  constexpr bool kShared = Config::kSharedRequests > 0;
  const PrefixTables tables =
      kShared ? PrefixTables(shared_tables, Config::kSharedNodes, Config::kSharedRequests)
              : PrefixTables(params.scratch, params.num_nodes, params.num_requests);
  ptx::allow_next_kernel();  // which waits for the end of this one
  ptx::wait_for_previous_kernel();
  PrefixPlanner<Config, Params>(params, sums, tables).run();
}

}  // namespace fi
