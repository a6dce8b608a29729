// Temperature and filters without the draw: masked logits, or probabilities renormalised over what is kept, with one read of
// the logits and one write, as fi_core.filter_logits defines them.
//
// What the filters keep is found as in sample.cuh; each block then writes the part of the row that it holds, which the whole
// cluster has read by then, so the output may be the logits.
// Config: Dtype, kVectorBytes, kOutVectorBytes, kClusterBlocks, kNumThreads, kWarpTokens, kProbs, kTopK, kTopP, kMinP.
// Params: logits [rows, vocab_size]; temperature, top_p, min_p float32 and top_k int32 [rows] or null; out float32.
#pragma once

#include "fi/ptx/dependent_launch.cuh"
#include "fi/sampling/filters.cuh"

namespace fi {

// Writes value(token, logit) for this thread's part of the slice.
template <class Config, class Params, class Value>
__device__ __forceinline__ void write_slice(const ClusterRow<Config>& row, const Params& params, Value value) {
  constexpr int kCount = Config::kOutVectorBytes / 4;
  const int64 index = static_cast<int>(blockIdx.x) / Config::kClusterBlocks;
  float* out = static_cast<float*>(params.out) + index * params.out_stride;
  for_each_four<Config, 1>(row.shared.slice, [&](int place, float4 four) {
    const int token = row.first_token + place;
    const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int e = 0; e < 4; e += kCount) {
      Pack<float, Config::kOutVectorBytes> pack;
#pragma unroll
      for (int idx = 0; idx < kCount; ++idx) pack.data[idx] = value(token + e + idx, logits[e + idx]);
      if (token + e < params.vocab_size) store_pack(out + token + e, pack);
    }
  });
}

// The first token with the largest logit, in all threads.
template <class Config>
__device__ __forceinline__ int first_of_largest(ClusterRow<Config>& row) {
  auto& shared = row.shared;
  int first = 0x7fffffff;
  for_each_four<Config>(shared.slice, [&](int place, float4 four) {
    const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int e = 3; e >= 0; --e) {
      if (logits[e] == row.largest) first = min(first, row.first_token + place + e);
    }
  });
  first = __reduce_min_sync(0xffffffffu, first);
  if (threadIdx.x % 32 == 0) shared.scratch[threadIdx.x / 32] = static_cast<uint64>(first);
  __syncthreads();
#pragma unroll 1
  for (int warp = 0; warp < ClusterRow<Config>::kWarps; ++warp) first = min(first, static_cast<int>(shared.scratch[warp]));
  if (threadIdx.x < 32) row.mailbox.send_to_all(kAmounts, &shared.block_amount[row.rank], static_cast<uint64>(first));
  row.mailbox.receive(kAmounts, Config::kClusterBlocks * 8);
#pragma unroll 1
  for (int block = 0; block < Config::kClusterBlocks; ++block) first = min(first, static_cast<int>(shared.block_amount[block]));
  return first;
}

// A row's parameters, loaded by one thread while the row is.
template <class Config, class Params>
struct FilterStage {
  static constexpr bool kChanges = false;

  const Params& params;
  ClusterShared<Config>& shared;
  int index;

  __device__ __forceinline__ void begun() const {
    clear_early(shared);
    if (threadIdx.x != 0) return;
    RowFilters filters = load_filters<Config>(params, index);
    normalise(filters, params.vocab_size);
    shared.filters = filters;
  }
};

template <class Config, class Params>
__device__ __forceinline__ void filter_logits(const Params& params) {
  static_assert(sizeof(ClusterShared<Config>) <= Config::kSharedBytes);
  extern __shared__ __align__(16) unsigned char memory[];
  const int index = static_cast<int>(blockIdx.x) / Config::kClusterBlocks;
  ClusterRow<Config> row(*reinterpret_cast<ClusterShared<Config>*>(memory));
  ptx::wait_for_previous_kernel();
  const auto* logits = static_cast<const typename Config::Dtype*>(params.logits) + index * params.logits_stride;
  FilterStage<Config, Params> stage{params, row.shared, index};
  const Extremes extremes = load_slice<Config>(logits, row.first_token, params.vocab_size, row.shared.slice, stage);
  __syncthreads();
  const RowFilters& filters = row.shared.filters;
  row.share(extremes, params.vocab_size, filters.temperature, false);
  ptx::allow_next_kernel();

  if (!row.usable() || !filters.valid) {
    write_slice(row, params, [](int, float) { return Config::kProbs ? 0.0f : minus_infinity(); });
    return;
  }
  if (filters.greedy) {
    const int first = first_of_largest(row);
    write_slice(row, params, [&](int token, float logit) {
      if constexpr (Config::kProbs) return token == first ? 1.0f : 0.0f;
      return token == first ? logit : minus_infinity();
    });
    return;
  }
  RankPrefix prefix = every_token();
  Answer total;
  if constexpr (Config::kTopK || Config::kTopP) {
    constexpr Wish kWish = Config::kProbs ? Wish::kTotal : Wish::kNothing;
    bool known = false;
    if constexpr (Config::kBracket) known = kept_by_bracket(row, filters, kWish, prefix, total);
    if (!known) prefix = kept_prefix(row, filters, kWish, total);
  }
  const float min_p = filters.min_p;
  const auto kept_weight = [&](int token, float logit) {
    const float weight = row.weight(logit);
    const bool heavy = !Config::kMinP || weight >= min_p;
    return prefix.has(logit, token) && heavy ? weight : 0.0f;
  };
  if constexpr (Config::kProbs) {
    if (!total.known()) {
      row.sum_masses_over_warps([&](int place, float logit) { return kept_weight(row.first_token + place, logit); });
      uint64 before;
      total.amount = row.sum_over_blocks(before);
    }
    const float scale = 4294967296.0f / static_cast<float>(total.amount);
    write_slice(row, params, [&](int token, float logit) { return truncated(kept_weight(token, logit)) * scale; });
  } else {
    write_slice(row, params, [&](int token, float logit) {
      const bool kept = prefix.has(logit, token) && (min_p <= 0.0f || weight_of(row.largest - logit) >= min_p);
      return kept ? logit : minus_infinity();
    });
  }
}

}  // namespace fi
