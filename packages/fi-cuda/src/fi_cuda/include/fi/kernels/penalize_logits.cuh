// Bitmasks, bias and penalties without the draw, as fi_core.penalize_logits defines them, with one read and one write.
//
// A block takes a part of a row through shared memory, where the sparse changes are patches of single tokens
// (fi/sampling/penalties.cuh, which has their Params). Dense counts are read beside the part as it is written.
// Config: Dtype, kVectorBytes (of logits and out), kNumThreads, kWarpTokens, kParts (blocks a row), kDense.
// Params: logits and out [rows, vocab_size]; slots (int64: a row's place in the columns, below 0: none; null: in order);
// prompt_counts and output_counts int32 [rows of histories, vocab_size] or null, of prompt_stride and output_stride.
#pragma once

#include "fi/ptx/dependent_launch.cuh"
#include "fi/sampling/penalties.cuh"

namespace fi {

// Repetition, frequency and presence of one token by dense counts.
template <class Config, class Params>
__device__ __forceinline__ float penalised_by_counts(const Params& params, const PenaltyPatch<Config, Params>& at, int token,
                                                     float value) {
  const int* prompt = static_cast<const int*>(params.prompt_counts);
  const int* output = static_cast<const int*>(params.output_counts);
  const int said = output == nullptr ? 0 : output[at.history * params.output_stride + token];
  if (params.repetition != nullptr) {
    const bool asked = prompt != nullptr && prompt[at.history * params.prompt_stride + token] != 0;
    const float factor = static_cast<const float*>(params.repetition)[at.place];
    if (asked || said != 0) value = value > 0.0f ? __fdiv_rn(value, factor) : __fmul_rn(value, factor);
  }
  if (params.frequency != nullptr) {
    const float each = static_cast<const float*>(params.frequency)[at.place];
    value = __fsub_rn(value, __fmul_rn(each, static_cast<float>(said)));
  }
  if (params.presence != nullptr && said > 0) value = __fsub_rn(value, static_cast<const float*>(params.presence)[at.place]);
  return value;
}

template <class Config, class Params>
__device__ __forceinline__ void penalize_logits(const Params& params) {
  using T = typename Config::Dtype;
  constexpr int kTokens = RowShape<Config>::kBlockTokens;
  constexpr int kMost = 4 * static_cast<int>(sizeof(T));
  constexpr int kBytes = Config::kVectorBytes < kMost ? Config::kVectorBytes : kMost;
  constexpr int kCount = kBytes / static_cast<int>(sizeof(T));
  static_assert(kTokens * 4 <= Config::kSharedBytes && kTokens % 32 == 0);
  extern __shared__ __align__(16) unsigned char memory[];
  float* slice = reinterpret_cast<float*>(memory);
  const int64 index = blockIdx.x / Config::kParts;
  const int first_token = static_cast<int>(blockIdx.x % Config::kParts) * kTokens;
  ptx::wait_for_previous_kernel();
  const int64 slot = params.slots == nullptr ? index : static_cast<const int64*>(params.slots)[index];
  const bool changed = slot >= 0;
  const T* logits = static_cast<const T*>(params.logits) + index * params.logits_stride;
  __shared__ PenaltyShared<kTokens> kept;
  PenaltyPatch<Config, Params> patch(params, kept, slice, first_token);
  bool fits = true;
  if (changed) {
    patch.locate(static_cast<int>(index), slot);
    PenaltyStage<Config, Params> stage{patch, static_cast<int>(index)};
    load_slice<Config>(logits, first_token, params.vocab_size, slice, stage);
    fits = patch.apply();
  } else {
    load_slice<Config>(logits, first_token, params.vocab_size, slice);
    __syncthreads();
  }
  ptx::allow_next_kernel();
  T* out = static_cast<T*>(params.out) + index * params.out_stride;
  for_each_four<Config, 1>(slice, [&](int place, float4 four) {
    const int token = first_token + place;
    const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int e = 0; e < 4; e += kCount) {
      if (token + e >= params.vocab_size) break;  // packs lie within a row as a whole
      Pack<T, kBytes> pack;
#pragma unroll
      for (int idx = 0; idx < kCount; ++idx) {
        const bool stays = fits && (!changed || patch.allowed(place) >> (e + idx) & 1);
        float value = stays ? logits[e + idx] : minus_infinity();
        if (Config::kDense && changed) value = penalised_by_counts(params, patch, token + e + idx, value);
        pack.data[idx] = from_float<T>(value);
      }
      store_pack(out + token + e, pack);
    }
  });
}

}  // namespace fi
