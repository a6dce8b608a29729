// The list of tiles of a batch whose requests share prefixes, filled on the GPU from lengths and nodes that lie there.
//
// One block. Requests stand in the order of the forest, so the query tokens of a node are a stretch of one list of tokens. Only
// requests whose tokens fit one tile take part: longer ones read their keys once for a whole tile anyway. A node that a single
// request uses, or that is not what SharedPrefixes says, is left to its members, as are the nodes within it. One that costs more
// than it saves leaves its keys to the nodes within it and to its other members.
// Nodes' tiles are cut into pieces of equal length, of which a list schedule of cost-model lengths ends first; requests' own
// keys are cut where one tile would take more than a quarter of the step. So long pieces come first and the short rest fills up.
// With kYields the decode kernel, whose plan other blocks make beside this one (attention_plan.cuh), has the batch if by the
// costs it is through no later.
// A batch beyond the limits, or with negative lengths, has no tiles, and nothing is written past buffers of the same capacity.
// Config: kNumThreads, kQueryTokens (a tile), kGroupTokens, kConsumers, kGroupSize, kTokens (keys a step), kAlign (a piece's first key is a
// multiple), kCausal, kHeads (KV heads), kWorkers, kItemCost, kNodeItemCost, kStepCost, kGroupCost (of a further warpgroup's rows),
// kChoose (nodes that do not pay are left out), kYields, and then kUnitPs, kLevelsPs, kReadPs, kAttendPs, kPairPs, kReuseTokens: times
// of fi_cuda.kernels.attention.prefix.SharingTimes; kBounded (more tokens may take part than there is room for);
// kTableNodes and kTableRequests (that tables in shared memory hold; 0: they lie in `tables`). With kYields those of attention_plan.
// Params: q_indptr, kv_lens, nodes int [num_nodes, 4], order int [num_requests] or null; tables (see PrefixTables); rows int [., 16],
// header, tokens and positions int [max_q_tokens], segments [., max_segments]; limits; num_requests, num_nodes; those of attention_plan.
#pragma once

#include "fi/attention/prefix_write.cuh"
#include "fi/kernels/attention_plan.cuh"
#include "fi/ptx/dependent_launch.cuh"
#include "fi/softmax/columns.cuh"

namespace fi {

// What the steps of a planning block share.
struct PrefixSums {
  unsigned best[32];  // of each warp
  int longest_node, longest_own;
};

template <class Config, class Params>
class PrefixPlanner {
  static constexpr int kThreads = Config::kNumThreads, kWarps = kThreads / 32;
  static constexpr int kCandidates = 64;  // numbers of pieces of the longest node
  static constexpr int kSharers = kThreads / kCandidates;  // threads that add up the nodes for one of them
  static constexpr int kShare = 4;  // of the time of a step that a tile of a request's own keys may take
  static constexpr int kLeastOwnSteps = 2;

 public:
  __device__ __forceinline__ PrefixPlanner(const Params& params, PrefixSums& sums, const PrefixTables& tables)
      : params_(params), sums_(sums), thread_(static_cast<int>(threadIdx.x)), thread_from_end_(kThreads - 1 - thread_),
        warp_(thread_ / 32), lane_(thread_ % 32),
        given_(static_cast<const PrefixNode*>(params.nodes)), tables_(tables), nodes_(tables.nodes), places_(tables.places) {}

  __device__ __forceinline__ void run() {
    PrefixHeader header = {};
    if (load() && plan_nodes()) {
      header = PrefixWriter<Config, Params>(params_, tables_, chunk_, sums_.longest_own).run();
    }
    if (thread_ == 0) *static_cast<PrefixHeader*>(params_.header) = header;
  }

 private:
  static __device__ __forceinline__ bool contains(const NodeWork& outer, const NodeWork& inner) {
    return outer.member_begin < outer.member_end && outer.member_begin <= inner.member_begin && inner.member_end <= outer.member_end;
  }

  __device__ __forceinline__ NodeWork loaded(int idx) const {
    const PrefixNode node = given_[idx];
    const bool is_one = 0 <= node.member_begin && node.member_begin < node.member_end && node.member_end <= params_.num_requests &&
                        0 <= node.kv_begin && node.kv_begin < node.kv_end && node.kv_end <= params_.max_kv_len;
    if (!is_one) return NodeWork{};
    return {node.member_begin, node.member_end, node.kv_begin, node.kv_end, node.kv_begin};
  }

  // A place's request; no tokens beyond the limits.
  __device__ __forceinline__ bool load_place(int place) const {
    const int count = params_.num_requests, *order = static_cast<const int*>(params_.order);
    const int request = order == nullptr ? place : order[place];
    PlaceWork work = {};
    bool within = 0 <= request && request < count;
    if (within) {
      const int* q_indptr = static_cast<const int*>(params_.q_indptr) + request;
      const int begin = q_indptr[0], end = q_indptr[1], kv_len = static_cast<const int*>(params_.kv_lens)[request];
      within = 0 <= begin && begin <= end && end <= params_.max_q_tokens && end - begin <= params_.max_q_len && 0 <= kv_len &&
               kv_len <= params_.max_kv_len;
      if (within) work = {request, begin, end - begin, kv_len};
    }
    work.node = -1;
    places_[place] = work;
    return within;
  }

  // Nodes and requests into the tables, and the list of tokens; whether the batch is within the limits.
  __device__ __forceinline__ bool load() {
    const int count = params_.num_requests;
    bool within = true;
    if (thread_ == 0) sums_.longest_node = sums_.longest_own = 0;
    for (int idx = thread_from_end_; idx < params_.num_nodes; idx += kThreads) nodes_[idx] = loaded(idx);
    int total[3] = {};
    scan_over<kThreads>(
        count, total,
        [&](int place, int(&own)[3]) {
          within &= load_place(place);
          const PlaceWork& work = places_[place];
          own[1] = work.template takes_part<Config>();
          own[0] = own[1] ? work.q_len : 0;
          own[2] = work.q_len;
        },
        [&](int place, const int(&before)[3], const int(&own)[3]) {
          PlaceWork& work = places_[place];
          work.t_begin = before[0];
          work.members_before = before[1];
          if (before[0] + own[0] > params_.max_q_tokens) return;  // an order that is no permutation
          int *tokens = static_cast<int*>(params_.tokens) + before[0], *positions = static_cast<int*>(params_.positions) + before[0];
          for (int idx = 0; idx < own[0]; ++idx) {
            tokens[idx] = work.q_begin + idx;
            positions[idx] = query_position(idx, work.q_len, work.kv_len);
          }
        });
    if (thread_ == 0) {
      places_[count].t_begin = total[0];
      places_[count].members_before = total[1];
    }
    return __syncthreads_and(within) && total[2] <= params_.max_q_tokens;
  }

  // Decides which nodes are used, and in how many pieces; false: the decode kernel has the batch.
  __device__ __forceinline__ bool plan_nodes() {
    find_parents();
    find_used_nodes();
    if (Config::kYields && sums_.longest_node == 0) return false;
    return choose_pieces(own_cost());
  }

  // The innermost node around each is the last one before it that has its members.
  __device__ __forceinline__ void find_parents() {
    for (int idx = thread_; idx < params_.num_nodes; idx += kThreads) {
      NodeWork work = nodes_[idx];
      work.parent = -1;
#pragma unroll 4
      for (int other = 0; other < idx; ++other) {
        if (contains(nodes_[other], work)) work.parent = other;
      }
      const PlaceWork &first = places_[work.member_begin], &end = places_[work.member_end];
      const int members = end.members_before - first.members_before;
      work.t_begin = first.t_begin;
      work.num_tokens = end.t_begin - first.t_begin;
      const bool fits = members > 1 && work.kv_begin == (work.parent < 0 ? 0 : nodes_[work.parent].kv_end);
      work.tiles = tiles_of(work.num_tokens, Config::kQueryTokens);
      work.step_cost = step_cost_of_all<Config>(work.num_tokens);
      // Reading its keys once costs less than each of its members reading them.
      const int steps = steps_from<Config>(work.kv_begin, work.kv_end), a_step = members * Config::kStepCost - work.step_cost;
      const bool pays = static_cast<float>(a_step) * static_cast<float>(steps) > static_cast<float>(work.tiles * Config::kNodeItemCost);
      work.state = (fits ? kFits : 0) | (pays || !Config::kChoose ? kPays : 0);
      work.members = members;
      // Others read what is as it was, its members and keys.
      nodes_[idx].t_begin = work.t_begin;
      nodes_[idx].num_tokens = work.num_tokens;
      nodes_[idx].parent = work.parent;
      nodes_[idx].state = work.state;
      nodes_[idx].tiles = work.tiles;
      nodes_[idx].step_cost = work.step_cost;
      nodes_[idx].members = work.members;
    }
    __syncthreads();
  }

  // Sets `pieces` to 1 for the nodes that are used: they pay, and what is around them fits.
  __device__ __forceinline__ void find_used_nodes() {
    int total[1] = {};
    const auto look_at = [&](int idx) {
      NodeWork& work = nodes_[idx];
      bool used = (work.state & kPays) != 0, alone = true;
      int depth = 0, first = work.kv_begin;
      for (int node = idx; node >= 0 && used; node = nodes_[node].parent) {
        const int state = nodes_[node].state;
        if (node != idx && (state & kPays) != 0) alone = false;
        if (alone) first = nodes_[node].kv_begin;
        used = (state & kFits) != 0 && ((state & kPays) == 0 || ++depth < params_.max_segments);
      }
      work.kv_first = first;
      work.steps = steps_from<Config>(first, work.kv_end);
      work.pieces = used;
      return used;
    };
    const auto keep = [&](int idx) { atomicMax(&sums_.longest_node, nodes_[idx].steps); };
    if constexpr (Config::kBounded) {
      scan_over<kThreads>(
          params_.num_nodes, total, [&](int idx, int(&own)[1]) { own[0] = look_at(idx) ? nodes_[idx].num_tokens : 0; },
          [&](int idx, const int(&before)[1], const int(&own)[1]) {
            // Nodes within it stand behind it and are left out too.
            if (before[0] + own[0] > params_.max_sharing_tokens) nodes_[idx].pieces = 0;
            if (nodes_[idx].pieces > 0) keep(idx);
          });
    } else {
      for (int idx = thread_; idx < params_.num_nodes; idx += kThreads) {
        if (look_at(idx)) keep(idx);
      }
      __syncthreads();
    }
  }

  // The innermost node that a place's request uses, or -1: nodes within a node come later.
  __device__ __forceinline__ int innermost(int place) const {
    int found = -1;
#pragma unroll 4
    for (int idx = 0; idx < params_.num_nodes; ++idx) {
      const NodeWork& node = nodes_[idx];
      if (node.pieces > 0 && node.member_begin <= place && place < node.member_end) found = idx;
    }
    return found;
  }

  // Gives each place its node and its own keys; the thread's share of the batch's costs.
  __device__ __forceinline__ BatchCost own_cost() const {
    BatchCost cost = {};
    int longest = 0;
    for (int place = thread_; place < params_.num_requests; place += kThreads) {
      PlaceWork& work = places_[place];
      if (work.template takes_part<Config>()) work.node = innermost(place);
      if (work.node >= 0) work.own_first = nodes_[work.node].kv_end;
      work.steps = steps_from<Config>(work.own_first, work.kv_len);
      longest = max(longest, work.steps);
      cost.own += static_cast<float>(tiles_of(work.q_len, Config::kQueryTokens) * Config::kItemCost);
      cost.own += static_cast<float>(work.steps) * static_cast<float>(step_cost_of_all<Config>(work.q_len));
      if constexpr (Config::kYields) {
        const float kv_len = static_cast<float>(work.kv_len);
        cost.tokens += kv_len;
        cost.attended += kv_len * static_cast<float>(max(Config::kAttendPs, work.q_len * Config::kPairPs));
      }
    }
    for (int idx = thread_from_end_; idx < params_.num_nodes && Config::kYields; idx += kThreads) {
      const NodeWork& work = nodes_[idx];
      if (work.pieces == 0) continue;
      const float keys = static_cast<float>(work.kv_end - work.kv_first);
      cost.shared += keys;
      cost.again += keys * static_cast<float>(work.members - 1);
    }
    if (longest > 0) atomicMax(&sums_.longest_own, longest);
    return cost;
  }

  // Whether the decode kernel is through no later than a list that ends after `time`.
  static __device__ __forceinline__ bool is_better_unshared(const BatchCost& cost, float time) {
    const float reuse = static_cast<float>(Config::kReuseTokens);
    const float found = cost.shared <= reuse ? cost.again : cost.again * (reuse / cost.shared);
    const float unshared = fmaxf((cost.tokens - found) * static_cast<float>(Config::kReadPs), cost.attended);
    return unshared <= time * static_cast<float>(Config::kUnitPs) + static_cast<float>(Config::kLevelsPs);
  }

  // The longest piece of which a list schedule ends first, and from that how long requests' own pieces may be.
  __device__ __forceinline__ bool choose_pieces(const BatchCost& mine) {
    static_assert(kThreads == kCandidates * kSharers && kSharers <= 32);
    constexpr float kLongest = (1 << 26) - 1;  // time beside the candidate in 32 bits
    const int longest = sums_.longest_node, candidate = thread_ / kSharers;
    const int chunk = max(quotient(longest + candidate, candidate + 1), 1);
    int tiles = 0, slowest = 0;
    float parts = 0.0f, cost = 0.0f;
#pragma unroll 1
    for (int idx = thread_ % kSharers; idx < params_.num_nodes; idx += kSharers) {
      const NodeWork& work = nodes_[idx];
      if (work.pieces == 0) continue;
      const int pieces = quotient(work.steps + chunk - 1, chunk), its_tiles = work.tiles * pieces;
      tiles += its_tiles;
      parts += static_cast<float>(work.num_tokens) * static_cast<float>(pieces);
      cost += static_cast<float>(its_tiles * Config::kNodeItemCost) + static_cast<float>(work.steps) * static_cast<float>(work.step_cost);
      slowest = max(slowest, step_cost<Config>(work.num_tokens));
    }
#pragma unroll
    for (int distance = 1; distance < kSharers; distance *= 2) {
      tiles += __shfl_xor_sync(0xffffffffu, tiles, distance);
      parts += __shfl_xor_sync(0xffffffffu, parts, distance);
      cost += __shfl_xor_sync(0xffffffffu, cost, distance);
      slowest = max(slowest, __shfl_xor_sync(0xffffffffu, slowest, distance));
    }
    const BatchCost own = sum_over_block<kThreads>(mine);
    constexpr float kOfWorker = static_cast<float>(Config::kHeads) / static_cast<float>(Config::kWorkers);
    const float alone = ceilf(static_cast<float>(tiles) * kOfWorker) * static_cast<float>(chunk * slowest + Config::kNodeItemCost);
    const float time = fminf(fmaxf(alone, (own.own + cost) * kOfWorker), kLongest);
    const bool fits = candidate == 0 || (tiles <= params_.max_node_rows && parts <= static_cast<float>(params_.max_node_tokens));
    unsigned best = fits ? static_cast<unsigned>(time) * kCandidates + static_cast<unsigned>(candidate) : ~0u;
    best = __reduce_min_sync(0xffffffffu, best);
    if (lane_ == 0) sums_.best[warp_] = best;
    __syncthreads();
    best = __reduce_min_sync(0xffffffffu, sums_.best[lane_ % kWarps]);
    const int ends = static_cast<int>(best / kCandidates);
    if (Config::kYields && is_better_unshared(own, static_cast<float>(ends))) return false;
    const int pieces = static_cast<int>(best % kCandidates) + 1;
    const int own_steps = min(quotient(ends, kShare * Config::kStepCost), sums_.longest_own);
    chunk_ = {max((longest + pieces - 1) / pieces, 1), max(own_steps, kLeastOwnSteps)};
    return true;
  }

  const Params& params_;
  PrefixSums& sums_;
  const int thread_;
  const int thread_from_end_;  // what few threads do is shared out from both ends, so that different warps do it side by side
  const int warp_, lane_;
  PieceSteps chunk_ = {};
  const PrefixNode* given_;
  const PrefixTables& tables_;
  NodeWork* nodes_;
  PlaceWork* places_;
};

template <class Config, class Params>
__device__ __forceinline__ void attention_prefix_plan(const Params& params) {
  extern __shared__ __align__(16) unsigned char prefix_tables[];
  __shared__ PrefixSums sums;
  if constexpr (Config::kYields) {
    if (blockIdx.x + 1 < gridDim.x) {
      attention_plan<Config>(params);
      return;
    }
  }
  const PrefixTables tables = Config::kTableRequests > 0
                                  ? PrefixTables(prefix_tables, Config::kTableNodes, Config::kTableRequests)
                                  : PrefixTables(params.tables, params.num_nodes, params.num_requests);
  ptx::allow_next_kernel();  // which waits for the end of this one
  ptx::wait_for_previous_kernel();
  PrefixPlanner<Config, Params>(params, sums, tables).run();
}

}  // namespace fi
