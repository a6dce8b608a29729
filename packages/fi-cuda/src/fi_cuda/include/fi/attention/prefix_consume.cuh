// The work of a consumer warpgroup where prefixes are shared. A tile of a request's own keys has rows for one warpgroup and waits
// for memory: with kSlices the warpgroups share the keys of each of its steps, so that a step is over sooner. Every
// warpgroup leaves what it knows as a part of the tile.
#pragma once

#include "fi/attention/prefill_consume.cuh"
#include "fi/attention/prefix_store.cuh"

namespace fi {

template <class Config, class Params>
class PrefixConsumer : public PrefillConsumer<Config, Params, PrefixStore<Config, Params>> {
  using Base = PrefillConsumer<Config, Params, PrefixStore<Config, Params>>;
  using State = PrefillState<Config, Params>;
  using Rows = GroupRows<Config, Params>;
  using Steps = ItemSteps<Config>;
  static constexpr int kSlices = Config::kSlices;
  static constexpr int kUnit = 16;  // keys
  // Keys of a slice; the last one has what is left.
  static constexpr int kSlice = (Config::kTokens / kUnit + kSlices - 1) / kSlices * kUnit;
  static constexpr int kLastSlice = Config::kTokens - (kSlices - 1) * kSlice;
  static_assert(kSlices == 1 || (kSlices == Config::kConsumers && !Config::kOverlap && !Config::kPingPong && kLastSlice > 0));

 public:
  using Base::Base;

  __device__ __forceinline__ void run() {
    if constexpr (kSlices == 1) {
      Base::run();
      return;
    }
#pragma unroll 1
    while (true) {
      Base::shared_.query_ring.wait_full(Base::query_place());
      const AttentionItem& item = Base::shared_.items[Base::item_.stage];
      if (item.request == kNoRequest) return;
      if (item.slices <= 1) Base::attend(item);
      else if (Base::warpgroup_ < kSlices - 1) attend_slice<kSlice>(item);
      else attend_slice<kLastSlice>(item);
      Base::item_.advance();
    }
  }

 private:
  // kWidth keys of every step, for the rows of the first warpgroup.
  template <int kWidth>
  __device__ __forceinline__ void attend_slice(const AttentionItem& item) {
    const Rows rows(Base::params_, item, 0);
    const Steps steps(item, Base::params_.window);
    Base::state_.begin(Base::score_of(item));
    slice_step<kWidth, true>(item, rows, steps, 0);
#pragma unroll 1
    for (int step = 1; step < steps.num_steps; ++step) slice_step<kWidth, false>(item, rows, steps, step);
    Base::store_.finish_slice(item, Base::state_);
  }

  template <int kWidth, bool kFresh>
  __device__ __forceinline__ void slice_step(const AttentionItem& item, const Rows& rows, const Steps& steps, int step) {
    const int begin = Base::warpgroup_ * kSlice, position = steps.position(step) + begin;
    float scores[kWidth / 2], rescale[2];
    unsigned weights[kWidth / kUnit][4];
    Base::wait_full(Base::shared_.key_ring, Base::key_);
    State::template multiply_keys<kWidth>(scores, Base::shared_.queries[Base::query_place().stage][0],
                                          Base::shared_.keys[Base::key_.stage] + begin * kBoxRowBytes);
    ptx::wgmma_wait<0>();
    Base::release_keys(steps, step);
    Base::state_.template make_scores<kWidth>(scores, Base::params_, item, rows, position);
    const bool raised = Base::state_.raise(scores, rescale);
    if (!kFresh && raised) Base::state_.rescale_output(rescale);
    Base::state_.template weigh<kWidth>(scores);
    State::template pack<kWidth>(scores, weights);
    Base::wait_full(Base::shared_.value_ring, Base::value_place());
    if constexpr (kFresh) Base::clear(max(item.kv_end - steps.last, begin), begin + kWidth);
    Base::state_.template multiply_values<kWidth, kFresh>(
        weights, Base::shared_.values[Base::value_place().stage] + begin * kBoxRowBytes);
    ptx::wgmma_wait<0>();
    ptx::pin_registers(Base::state_.output);
    Base::release_values();
  }
};

}  // namespace fi
