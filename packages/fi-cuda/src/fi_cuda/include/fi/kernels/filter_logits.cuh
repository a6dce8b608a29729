// Temperature and filters without the draw: masked logits, or probabilities renormalised over what is kept, with one read of
// the logits and one write, as fi_core.filter_logits defines them.
//
// What the filters keep is found as in sample.cuh; each block then writes the part of the row that it holds, which the whole
// cluster has read by then, so the output may be the logits.
// Config: Dtype, kVectorBytes, kOutVectorBytes, kClusterBlocks, kNumThreads, kWarpTokens, kProbs.
// Params: logits [rows, vocab_size]; temperature, top_p, min_p float32 and top_k int32 [rows] or null; out float32.
#pragma once

#include "fi/ptx/dependent_launch.cuh"
#include "fi/sampling/filters.cuh"

namespace fi {

// Writes value(token, logit) for this thread's part of the slice.
template <class Config, class Value>
__device__ __forceinline__ void write_slice(const ClusterRow<Config>& row, int vocab_size, float* out, Value value) {
  constexpr int kCount = Config::kOutVectorBytes / 4;
  for_each_four<Config>(row.shared.slice, [&](int place, float4 four) {
    const int token = row.first_token + place;
    const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int e = 0; e < 4; e += kCount) {
      Pack<float, Config::kOutVectorBytes> pack;
#pragma unroll
      for (int idx = 0; idx < kCount; ++idx) pack.data[idx] = value(token + e + idx, logits[e + idx]);
      if (token + e < vocab_size) store_pack(out + token + e, pack);
    }
  });
}

// The mass of the kept tokens of the whole row.
template <class Config, class Mass>
__device__ __forceinline__ uint64 total_mass(ClusterRow<Config>& row, Mass kept_mass) {
  constexpr int kBlocks = Config::kClusterBlocks;
  const uint64 own = row.sum_over_block(kept_mass);
  if (threadIdx.x < 32) push_to_all<kBlocks>(&row.shared.block_amount[row.rank], own);
  cluster_sync<kBlocks>();
  uint64 before;
  return row.sum_over_blocks(before);
}

// The first token with the largest logit, in all threads.
template <class Config>
__device__ __forceinline__ int first_of_largest(ClusterRow<Config>& row) {
  constexpr int kBlocks = Config::kClusterBlocks;
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
#pragma unroll
  for (int warp = 0; warp < ClusterRow<Config>::kWarps; ++warp) first = min(first, static_cast<int>(shared.scratch[warp]));
  if (threadIdx.x < 32) push_to_all<kBlocks>(&shared.block_amount[row.rank], static_cast<uint64>(first));
  cluster_sync<kBlocks>();
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) first = min(first, static_cast<int>(shared.block_amount[block]));
  return first;
}

template <class Config, class Params>
__device__ __forceinline__ void filter_logits(const Params& params) {
  static_assert(sizeof(ClusterShared<Config>) <= Config::kSharedBytes);
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<ClusterShared<Config>*>(memory);
  if constexpr (Config::kClusterBlocks > 1) ptx::cluster_arrive();
  const int rank = cluster_rank<Config::kClusterBlocks>();
  const int index = static_cast<int>(blockIdx.x) / Config::kClusterBlocks;
  ClusterRow<Config> row{shared, rank, rank * RowShape<Config>::kBlockTokens, 0.0f, 0.0f};
  ptx::wait_for_previous_kernel();
  const RowFilters filters = row_filters(params, index);
  const auto* logits = static_cast<const typename Config::Dtype*>(params.logits) + index * params.logits_stride;
  float* out = static_cast<float*>(params.out) + index * params.out_stride;
  row.load(logits, params.vocab_size, filters.temperature, false);
  ptx::allow_next_kernel();

  if (!row.usable()) {
    write_slice(row, params.vocab_size, out, [](int, float) { return Config::kProbs ? 0.0f : minus_infinity(); });
    return;
  }
  // A min_p above 1 leaves nothing, and then the first token in rank order is kept.
  if (filters.greedy || filters.min_p > 1.0f) {
    const int first = first_of_largest(row);
    write_slice(row, params.vocab_size, out, [&](int token, float logit) {
      if constexpr (Config::kProbs) return token == first ? 1.0f : 0.0f;
      return token == first ? logit : minus_infinity();
    });
    return;
  }
  const RankPrefix prefix = kept_prefix(row, filters);
  const auto kept_mass = [&](int place, float logit) -> uint64 {
    const float weight = weight_of(row.largest - logit);
    return prefix.has(logit, row.first_token + place) && weight >= filters.min_p ? mass_of(weight) : 0;
  };
  if constexpr (Config::kProbs) {
    const float scale = 1.0f / static_cast<float>(total_mass(row, kept_mass));
    write_slice(row, params.vocab_size, out, [&](int token, float logit) {
      return static_cast<float>(kept_mass(token - row.first_token, logit)) * scale;
    });
  } else {
    write_slice(row, params.vocab_size, out, [&](int token, float logit) {
      const bool kept = prefix.has(logit, token) && (filters.min_p <= 0.0f || weight_of(row.largest - logit) >= filters.min_p);
      return kept ? logit : minus_infinity();
    });
  }
}

}  // namespace fi
