// The work of a consumer warpgroup of prefill: its rows of every item, step after step.
//
// The scores of a step are started before the values of the step before, so that one step's softmax runs beside products. With
// kPingPong warpgroups take turns in starting products, so that one's softmax runs beside another's products.
#pragma once

#include "fi/attention/prefill_rotate.cuh"
#include "fi/attention/prefill_store.cuh"

namespace fi {

// Store: what becomes of an item's rows.
template <class Config, class Params, class Store = PrefillStore<Config, Params>>
class PrefillConsumer {
  using Tile = PrefillTile<Config>;
  using Shared = PrefillShared<Config>;
  using State = PrefillState<Config, Params>;
  using Rows = GroupRows<Config, Params>;
  using Steps = ItemSteps<Config>;
  static constexpr int kTokens = Config::kTokens;
  static constexpr int kEdge = Config::kEdgeTokens;
  // The widest first step with code of its own. For shared prefixes a first step of all its keys is as every other: less code.
  static constexpr int kWidestFirst = Config::kOverlap || !Config::kLevels ? kTokens : (kTokens - 1) / kEdge * kEdge;
  static constexpr int kStepKeys = Tile::kStepElements;
  // Values that are multiplied where the copy engine put them, with whatever stands in the place of tokens that are not readable.
  static constexpr bool kDirect = Config::kBoxes && !Tile::kLanded;
  // Whole steps go round both rings together: one cursor is enough.
  static constexpr bool kTogether = !Config::kOverlap && Config::kKeyStages == Config::kValueStages;
  static_assert(kEdge <= kTokens && kEdge % kStepKeys == 0);

 public:
  __device__ __forceinline__ PrefillConsumer(const Params& params, Shared& shared, int warpgroup)
      : params_(params), shared_(shared), warpgroup_(warpgroup) {}

  __device__ __forceinline__ void run() {
    if (Config::kPingPong && warpgroup_ == Config::kConsumers - 1) pass_turn();
#pragma unroll 1
    while (true) {
      shared_.query_ring.wait_full(query_place());
      const AttentionItem& item = shared_.items[item_.stage];
      if (item.request == kNoRequest) return;
      attend(item);
      item_.advance();
    }
  }

 protected:
  __device__ __forceinline__ void attend(const AttentionItem& item) {
    const Rows rows(params_, item, warpgroup_);
    const Steps steps(item, params_.window);
    if (rows.first >= rows.end) {
      skip(steps);
      return;
    }
    state_.begin(score_of(item));
    if (steps.num_steps > 0) work_through(item, rows, steps);
    finish(item);
  }

  __device__ __forceinline__ void work_through(const AttentionItem& item, const Rows& rows, const Steps& steps) {
    if constexpr (Config::kRotaryDim > 0) rotate_queries(params_, item, rows, queries(), kOwnBarrier + warpgroup_);
    const int width = rows.by_any.high - steps.last;
    int step = 0;
    if constexpr (kWidestFirst > 0) {
      if (kWidestFirst == kTokens || width <= kWidestFirst) {
        first_step<kEdge>(item, rows, steps, width);
        step = 1;
      }
    }
    if (step == 0) begin_whole_steps(item, steps);
    if constexpr (Config::kOverlap) {
#pragma unroll 1
      for (; step < steps.num_steps; ++step) next_step(item, rows, steps, step);
      if (steps.num_steps > 1) last_values<kTokens, false>(weights_, item, steps);
    } else {
#pragma unroll 1
      for (; step < steps.num_steps; ++step) whole_step(item, rows, steps, step);
    }
  }

  // The queries are free: before the output where they were last read long ago, behind it where it goes through their place.
  __device__ __forceinline__ void finish(const AttentionItem& item) {
    if (!Store::kStaged) {
      if (item.kv_end == item.kv_begin) release(shared_.query_ring, query_place());
      store().finish(item, state_);
      return;
    }
    store().finish(item, state_);
    ptx::fence_proxy_async_shared();
    __syncwarp();
    release(shared_.query_ring, query_place());
  }

  // A warpgroup without rows of the item only keeps the rings and the turns going.
  __device__ __forceinline__ void skip(const Steps& steps) {
    if (steps.num_steps == 0 || Store::kStaged) release(shared_.query_ring, query_place());
#pragma unroll 1
    for (int step = 0; step < steps.num_steps; ++step) {
      shared_.key_ring.wait_full(key_);
      release_keys(steps, step);
      if constexpr (Config::kPingPong) {
        if (step > 0) {
          wait_turn();
          pass_turn();
        }
      }
      shared_.value_ring.wait_full(value_place());
      __syncwarp();  // nothing else keeps a lane from falling behind what the first one releases
      release_values();
    }
  }

  // The first step, of whose keys those beyond the first `width` are seen by no row, and left out; with kOverlap its values are
  // started beside the next step's scores.
  template <int kWidth>
  __device__ __forceinline__ void first_step(const AttentionItem& item, const Rows& rows, const Steps& steps, int width) {
    if constexpr (kWidth < kWidestFirst) {
      if (width > kWidth) {
        first_step<(kWidth + kEdge < kTokens ? kWidth + kEdge : kTokens)>(item, rows, steps, width);
        return;
      }
    }
    float scores[kWidth / 2];
    unsigned weights[kWidth / kStepKeys][4];
    wait_full(shared_.key_ring, key_);
    State::template multiply_keys<kWidth>(scores, queries(), shared_.keys[key_.stage]);
    ptx::wgmma_wait<0>();
    release_keys(steps, 0);
    state_.template make_scores<kWidth>(scores, params_, item, rows, steps.last);
    state_.raise_first(scores);
    state_.template weigh<kWidth>(scores);
    State::template pack<kWidth>(scores, weights);
    if (Config::kOverlap && steps.num_steps > 1) {
      // From here on it is a step like others: keys without weights cost products once an item, another copy of the loop's body
      // for each width costs seconds of compilation.
#pragma unroll
      for (int unit = 0; unit < kTokens / kStepKeys; ++unit) {
#pragma unroll
        for (int part = 0; part < 4; ++part) weights_[unit][part] = unit < kWidth / kStepKeys ? weights[unit][part] : 0u;
      }
      state_.clear_output();
    } else {
      last_values<kWidth, true>(weights, item, steps);
    }
  }

  // The first step is as all others: before it.
  __device__ __forceinline__ void begin_whole_steps(const AttentionItem& item, const Steps& steps) {
    state_.clear_output();
    if (kDirect && item.kv_end - steps.last < kTokens) {
      wait_full(shared_.value_ring, value_place());
      clear(item.kv_end - steps.last, kTokens);
    }
  }

  // A step on its own: its scores, then its values.
  __device__ __forceinline__ void whole_step(const AttentionItem& item, const Rows& rows, const Steps& steps, int step) {
    float scores[kTokens / 2];
    unsigned weights[kTokens / kStepKeys][4];
    wait_full(shared_.key_ring, key_);
    const bool takes_turn = Config::kPingPong && step > 0;  // first steps take none, whatever their width
    if (takes_turn) wait_turn();
    State::template multiply_keys<kTokens>(scores, queries(), shared_.keys[key_.stage]);
    if (takes_turn) pass_turn();
    ptx::wgmma_wait<0>();
    release_keys(steps, step);
    state_.make_and_raise(scores, params_, item, rows, steps.position(step), step,
                          [&](const float (&rescale)[2]) { state_.rescale_output(rescale); });
    state_.template weigh<kTokens, 0, Config::kParts>(scores);
    wait_full(shared_.value_ring, value_place());
    if constexpr (Config::kWindowed && kDirect) clear_ends(steps.lowest - steps.position(step), kTokens, kTokens);
    weigh_and_multiply<0>(scores, weights);
    ptx::wgmma_wait<0>();
    ptx::pin_registers(state_.output);
    release_values();
  }

  // The weights of a step in parts, each beside the products of the part before; those of the first are there.
  template <int kPart>
  __device__ __forceinline__ void weigh_and_multiply(float (&scores)[kTokens / 2], unsigned (&weights)[kTokens / kStepKeys][4]) {
    constexpr int kParts = Config::kParts;
    if constexpr (kPart < kParts) {
      if constexpr (kPart > 0) state_.template weigh<kTokens, kPart, kParts>(scores);
      State::template pack<kTokens, kPart, kParts>(scores, weights);
      state_.template multiply_values<kTokens, kPart, kParts>(weights, shared_.values[value_place().stage], false);
      weigh_and_multiply<kPart + 1>(scores, weights);
    }
  }

  // The scores of `step` beside the values of the step before, whose weights are at hand.
  __device__ __forceinline__ void next_step(const AttentionItem& item, const Rows& rows, const Steps& steps, int step) {
    float scores[kTokens / 2], rescale[2];
    wait_full(shared_.key_ring, key_);
    if constexpr (Config::kPingPong) wait_turn();
    State::template multiply_keys<kTokens>(scores, queries(), shared_.keys[key_.stage]);
    wait_full(shared_.value_ring, value_place());
    if (kDirect && step == 1) clear(item.kv_end - steps.last, kTokens);
    state_.template multiply_values<kTokens>(weights_, shared_.values[value_place().stage], false);
    if constexpr (Config::kPingPong) pass_turn();
    ptx::wgmma_wait<1>();
    bool raised = false;
    state_.make_and_raise(scores, params_, item, rows, steps.position(step), step, [&](const float (&its)[2]) {
      raised = true;
      rescale[0] = its[0];
      rescale[1] = its[1];
    });
    state_.template weigh<kTokens>(scores);
    release_keys(steps, step, state_.zero_of_weights());
    ptx::wgmma_wait<0>();
    release_values();
    ptx::pin_registers(state_.output);
    if (raised) state_.rescale_output(rescale);
    State::template pack<kTokens>(scores, weights_);
  }

  template <int kWidth, bool kFresh>
  __device__ __forceinline__ void last_values(const unsigned (&weights)[kWidth / kStepKeys][4], const AttentionItem& item,
                                              const Steps& steps) {
    wait_full(shared_.value_ring, value_place());
    if constexpr (kDirect && (kFresh || Config::kWindowed)) {
      // What lies before a window: of a first step on its own too, where it is not the last one.
      const int position = kFresh ? steps.last : item.kv_begin;
      clear_ends(Config::kWindowed ? steps.lowest - position : 0, kFresh ? item.kv_end - position : kWidth, kWidth);
    }
    state_.template multiply_values<kWidth>(weights, shared_.values[value_place().stage], kFresh);
    ptx::wgmma_wait<0>();
    ptx::pin_registers(state_.output);
    release_values();
  }

  // Zeros in the place of the stage's values [begin, end) that are not readable: a weight of zero does not cancel a NaN. Every
  // warpgroup does it for itself; what others write meanwhile are the same zeros.
  __device__ __forceinline__ void clear(int begin, int end) {
    if (begin >= end) return;
    constexpr int kUnits = kBoxRowBytes / 16;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
    unsigned char* stage = shared_.values[value_place().stage];
    for (int unit = begin * kUnits + thread; unit < end * kUnits; unit += kWarpgroupThreads) {
#pragma unroll
      for (int column = 0; column < Tile::kValueColumns; ++column) {
        *reinterpret_cast<int4*>(stage + column * Tile::kKeyColumnBytes + unit * 16) = int4{};
      }
    }
    ptx::fence_proxy_async_shared();
    ptx::named_barrier_sync(kOwnBarrier + warpgroup_, kWarpgroupThreads);
  }

  // The same of the values [0, low) and [high, end). In whole steps, few rows are cleared by every warp for itself, which is sooner
  // done than waiting for the others; overlapped ones have no registers for it.
  __device__ __forceinline__ void clear_ends(int low, int high, int end) {
    if constexpr (Config::kOverlap) {
      clear(high, end);
      clear(0, low);
      return;
    }
    if (low <= 0 && high >= end) return;
    constexpr int kUnits = kBoxRowBytes / 16, kFew = 16;
    const bool alone = max(low, 0) + max(end - high, 0) <= kFew;
    const int stride = alone ? kWarpThreads : kWarpgroupThreads, first = static_cast<int>(threadIdx.x) & (stride - 1);
    clear_units(first, low * kUnits, stride);
    clear_units(high * kUnits + first, end * kUnits, stride);
    ptx::fence_proxy_async_shared();
    if (alone) __syncwarp();
    else ptx::named_barrier_sync(kOwnBarrier + warpgroup_, kWarpgroupThreads);
  }
  // Units of 16 bytes of a column's rows.
  __device__ __forceinline__ void clear_units(int first, int end, int stride) {
    unsigned char* stage = shared_.values[value_place().stage];
#pragma unroll 1
    for (int unit = first; unit < end; unit += stride) {
#pragma unroll
      for (int column = 0; column < Tile::kValueColumns; ++column) {
        *reinterpret_cast<int4*>(stage + column * Tile::kKeyColumnBytes + unit * 16) = int4{};
      }
    }
  }

  // The keys are free, and with the last step the queries. `zero` is 0: an arrival is not moved across a wait for products, so
  // what `zero` is made of is computed before the wait that follows, beside those products.
  __device__ __forceinline__ void release_keys(const Steps& steps, int step, int zero = 0) {
    if (threadIdx.x % kWarpThreads == 0) ptx::arrive(&shared_.key_ring.empty[key_.stage] + zero);
    if constexpr (!kTogether) key_.advance();
    if (!Store::kStaged && step == steps.num_steps - 1) release(shared_.query_ring, query_place());
  }

  __device__ __forceinline__ void release_values() {
    release(shared_.value_ring, value_place());
    value_place().advance();
  }

  __device__ __forceinline__ RingCursor<Config::kQueryStages> query_place() const {
    return {item_.stage % Config::kQueryStages, static_cast<unsigned>(item_.stage / Config::kQueryStages)};
  }

  __device__ __forceinline__ auto& value_place() {
    if constexpr (kTogether) return key_;
    else return value_;
  }

  __device__ __forceinline__ unsigned char* queries() const { return shared_.queries[query_place().stage][warpgroup_]; }

  // What was not copied by the copy engine has to be shown to the products, unless who copied it did.
  template <class AnyRing, class Cursor>
  static __device__ __forceinline__ void wait_full(AnyRing& ring, Cursor cursor) {
    ring.wait_full(cursor);
    if constexpr (!Config::kBoxes && !kGathered<Config>) ptx::fence_proxy_async_shared();
  }

  // One arrival a warp: its lanes' products are complete, as all call wgmma_wait together.
  template <class AnyRing, class Cursor>
  static __device__ __forceinline__ void release(AnyRing& ring, Cursor cursor) {
    if (threadIdx.x % kWarpThreads == 0) ring.release(cursor);
  }

  __device__ __forceinline__ void wait_turn() const {
    ptx::named_barrier_sync(kTurnBarrier + warpgroup_, 2 * kWarpgroupThreads);
  }
  __device__ __forceinline__ void pass_turn() const {
    ptx::named_barrier_arrive(kTurnBarrier + (warpgroup_ + 1) % Config::kConsumers, 2 * kWarpgroupThreads);
  }

  __device__ __forceinline__ PrefillScore<Config> score_of(const AttentionItem& item) const {
    float scale = params_.scale;
    if constexpr (Config::kKScales) scale *= static_cast<const float*>(params_.k_scales)[item.kv_head * params_.k_scale_stride];
    PrefillScore<Config> score = {};
#pragma unroll
    for (int row = 0; row < PrefillScore<Config>::kUnits; ++row) {
      float its = scale;
      if constexpr (Config::kQScales) {
        its *= static_cast<const float*>(params_.q_scales)[store().head_of(item, row) * params_.q_scale_stride];
      }
      score.unit[row] = Config::kSoftCap ? params_.soft_cap : Config::kSignedScale ? 1.0f : its;
      score.inner[row] = Config::kSoftCap ? its / params_.soft_cap : its;
    }
    if constexpr (Config::kAlibi) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float slope = static_cast<const float*>(params_.slopes)[store().head_of(item, row)];
        score.slope[row] = slope / score.unit[row % PrefillScore<Config>::kUnits];
      }
    }
    return score;
  }

  // Made where it is used: kept from item to item, its numbers would take registers from the scores.
  __device__ __forceinline__ Store store() const { return Store(params_, shared_.flags + warpgroup_, warpgroup_, queries()); }

  const Params& params_;
  Shared& shared_;
  const int warpgroup_;
  State state_;
  unsigned weights_[kTokens / kStepKeys][4];  // of the step before, with kOverlap
  RingCursor<Shared::kItems> item_ = RingCursor<Shared::kItems>::consumer();
  RingCursor<Config::kKeyStages> key_ = RingCursor<Config::kKeyStages>::consumer();
  RingCursor<Config::kValueStages> value_ = RingCursor<Config::kValueStages>::consumer();
};

}  // namespace fi
