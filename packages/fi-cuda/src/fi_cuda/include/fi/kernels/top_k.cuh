// The k largest logits of each row with their tokens, and log-probabilities of them and of a chosen token, with one read of the
// logits: fi_core.top_k and fi_core.logprobs.
// Config: Dtype, kVectorBytes, kClusterBlocks, kNumThreads, kWarpTokens; kSorted: room for so many tokens to sort, a power of 2
// that is at least k, or 0 for k up to kSortedInRow; kLogprobs: values are log-probabilities, and `chosen` gets that of `tokens`.
// Params: logits [rows, vocab_size]; values float32 and indices int64 [rows, k], contiguous; k (may be 0 with kLogprobs); tokens
// int64 and chosen float32 [rows], with kLogprobs.
#pragma once

#include "fi/ptx/dependent_launch.cuh"
#include "fi/sampling/first_k.cuh"

namespace fi {

// log of the row's sum of exp(logit - largest), in all threads; NaN for an unusable row.
template <class Config>
__device__ __forceinline__ float log_of_sum(ClusterRow<Config>& row, bool usable) {
  auto& shared = row.shared;
  float sum = 0.0f;
  for_each_four<Config>(shared.slice, [&](int, float4 four) {
    const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (logits[e] > minus_infinity()) sum += expf(logits[e] - row.largest);
    }
  });
  // From here on in double, in a fixed order; the sums travel as integers.
  double wide = sum_over_lanes<32>(static_cast<double>(sum));
  if (threadIdx.x % 32 == 0) shared.scratch[threadIdx.x / 32] = static_cast<uint64>(__double_as_longlong(wide));
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x);
    const uint64 bits = lane < ClusterRow<Config>::kWarps ? shared.scratch[lane] : 0;
    wide = sum_over_lanes<32>(__longlong_as_double(static_cast<int64>(bits)));
    row.mailbox.send_to_all(kAmounts, &shared.block_amount[row.rank], static_cast<uint64>(__double_as_longlong(wide)));
  }
  row.mailbox.receive(kAmounts, Config::kClusterBlocks * 8);
  wide = 0.0;
#pragma unroll 1
  for (int block = 0; block < Config::kClusterBlocks; ++block) {
    wide += __longlong_as_double(static_cast<int64>(shared.block_amount[block]));
  }
  return usable ? logf(static_cast<float>(wide)) : not_a_number();
}

template <class Config, class Params>
__device__ __forceinline__ void top_k(const Params& params) {
  constexpr int kRowBytes = (sizeof(ClusterShared<Config>) + 15) / 16 * 16;
  static_assert(kRowBytes + 8 * Config::kSorted <= Config::kSharedBytes);
  extern __shared__ __align__(16) unsigned char memory[];
  ClusterRow<Config> row(*reinterpret_cast<ClusterShared<Config>*>(memory));
  uint64* sorted = Config::kSorted > 0 ? reinterpret_cast<uint64*>(memory + kRowBytes)
                                       : reinterpret_cast<uint64*>(ranked_tokens(row.shared));
  const int64 index = static_cast<int>(blockIdx.x) / Config::kClusterBlocks;
  ptx::wait_for_previous_kernel();
  const auto* logits = static_cast<const typename Config::Dtype*>(params.logits) + index * params.logits_stride;
  Extremes extremes = load_slice<Config>(logits, row.first_token, params.vocab_size, row.shared.slice);
  ptx::allow_next_kernel();
  const bool with_groups = params.k > 0 && params.k <= ShortList<Config>::kMaxK;
  row.share(extremes, params.vocab_size, 1.0f, with_groups);
  const bool usable = row.usable();
  bool grouped = with_groups;
  if (row.largest != row.largest) {
    grouped = false;
    extremes = replace_nan<Config>(row.shared.slice, params.vocab_size - row.first_token);
    row.meet();  // all have read the first ones, whose place these take
    row.share_extremes(extremes, false, kExtremesAgain);
  }
  float log_sum = 0.0f;
  if constexpr (Config::kLogprobs) {
    log_sum = log_of_sum(row, usable);
    if (row.rank == 0 && threadIdx.x == 0) {
      const int64 token = static_cast<const int64*>(params.tokens)[index];
      const bool inside = token >= 0 && token < params.vocab_size;
      const float logit = inside ? to_float(logits[token]) : 0.0f;
      static_cast<float*>(params.chosen)[index] = inside ? logit - row.largest - log_sum : minus_infinity();
    }
  }
  if (params.k == 0) return;
  float* values = static_cast<float*>(params.values) + index * params.k;
  int64* indices = static_cast<int64*>(params.indices) + index * params.k;
  FirstK<Config>{row}.run(params.k, grouped, sorted, [&](int rank, float logit, int token) {
    // As it is stored: -0 ranks like 0.
    const float stored = to_float(logits[token]);
    values[rank] = Config::kLogprobs ? logit - row.largest - log_sum : stored == stored ? stored : minus_infinity();
    indices[rank] = token;
  });
}

}  // namespace fi
