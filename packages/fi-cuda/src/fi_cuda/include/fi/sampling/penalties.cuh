// fi_core.PenaltyParams applied to a part of a row in shared memory: the bitmasks while it is loaded, the sparse rest as
// patches of single tokens by the block that holds them.
//
// Params: allowed, step_allowed (int32 masks, rows of allowed_stride and step_allowed_stride words); bias_indptr, bias_tokens,
// bias_values, bias_until; repetition, frequency, presence; history_rows; of the histories seen (seen_stride words a row),
// entries (pairs of token and count, entry_stride words a row, capacity pairs), num_entries, num_output. Null: not used.
#pragma once

#include "fi/sampling/row.cuh"

namespace fi {

// Which rows of the columns an output uses; its parameters lie at `place`, or nowhere if it is below 0.
template <class Params>
struct PenaltyRow {
  int64 place, history;
  const unsigned *allowed, *step_allowed, *seen;

  __device__ __forceinline__ void find(const Params& params, int64 output, int64 slot) {
    place = slot > 0 ? slot : 0;
    history = params.history_rows == nullptr ? place : static_cast<const int*>(params.history_rows)[output];
    allowed = row_of(params.allowed, place, params.allowed_stride);
    step_allowed = row_of(params.step_allowed, output, params.step_allowed_stride);
    seen = row_of(params.seen, history, params.seen_stride);
  }

  __device__ __forceinline__ static const unsigned* row_of(const void* column, int64 row, int64 stride) {
    return column == nullptr ? nullptr : static_cast<const unsigned*>(column) + row * stride;
  }

  // Bits of the tokens that are allowed, of the 32 around `token`.
  __device__ __forceinline__ unsigned word(int token) const {
    unsigned bits = 0xffffffffu;
    if (allowed != nullptr) bits = __ldg(allowed + token / 32);
    if (step_allowed != nullptr) bits &= __ldg(step_allowed + token / 32);
    return bits;
  }
};

struct NoPenalties {
  __device__ __forceinline__ unsigned word(int) const { return 0xffffffffu; }
};

// A block's part of a row: `num_tokens` from `first_token` (a multiple of 32) on.
template <int kThreads, class Params>
struct PenaltyPatch {
  const Params& params;
  const PenaltyRow<Params>& at;
  float* slice;
  int first_token, num_tokens;

  // Calls patch(place, entry) for those of the entries from `begin` to `end` whose token, token_of(entry), is in this part.
  template <class TokenOf, class Patch>
  __device__ __forceinline__ void for_each(int begin, int end, TokenOf token_of, Patch patch) const {
#pragma unroll 2
    for (int entry = begin + static_cast<int>(threadIdx.x); entry < end; entry += kThreads) {
      // Unsigned, so that tokens before this part, and -1, are beyond it.
      const unsigned place = static_cast<unsigned>(token_of(entry)) - static_cast<unsigned>(first_token);
      if (place < static_cast<unsigned>(num_tokens)) patch(static_cast<int>(place), entry);
    }
  }

  __device__ __forceinline__ void add_bias() const {
    const int* indptr = static_cast<const int*>(params.bias_indptr) + at.place;
    const int* tokens = static_cast<const int*>(params.bias_tokens);
    const int* until = static_cast<const int*>(params.bias_until);
    const int made = until == nullptr ? 0 : static_cast<const int*>(params.num_output)[at.history];
    for_each(indptr[0], indptr[1], [&](int entry) { return __ldg(tokens + entry); }, [&](int place, int entry) {
      float value = static_cast<const float*>(params.bias_values)[entry];
      if (until != nullptr && made < until[entry]) value = minus_infinity();
      slice[place] += value;
    });
  }

  // A warp takes up to 32 words at a time, and all its lanes the tokens of one of them.
  __device__ __forceinline__ void repeat(float factor) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int num_words = (num_tokens + 31) / 32;
    constexpr int kWarps = kThreads / 32;
    // Shares of the warps as equal as whole words allow.
    const int each = (num_words + kWarps - 1) / kWarps;
    const int end = min(num_words, (warp + 1) * each);
#pragma unroll 1
    for (int first = warp * each; first < end; first += 32) {
      const unsigned mine = first + lane < end ? __ldg(at.seen + first_token / 32 + first + lane) : 0;
      unsigned nonzero = __ballot_sync(0xffffffffu, mine != 0);
#pragma unroll 2
      while (nonzero != 0) {
        const int source = __ffs(static_cast<int>(nonzero)) - 1;
        nonzero &= nonzero - 1;
        const unsigned bits = __shfl_sync(0xffffffffu, mine, source);
        const int place = (first + source) * 32 + lane;
        if ((bits >> lane & 1) != 0 && place < num_tokens) {
          const float value = slice[place];
          slice[place] = value > 0.0f ? __fdiv_rn(value, factor) : value * factor;
        }
      }
    }
  }

  __device__ __forceinline__ void subtract_counts(int num_entries, float frequency, float presence) const {
    const int2* entries = reinterpret_cast<const int2*>(static_cast<const int*>(params.entries) + at.history * params.entry_stride);
    for_each(0, num_entries, [&](int entry) { return entries[entry].x; }, [&](int place, int entry) {
      // Rounded after each step, as the reference does.
      const float count = static_cast<float>(entries[entry].y);
      slice[place] = __fsub_rn(__fsub_rn(slice[place], __fmul_rn(frequency, count)), presence);
    });
  }

  // All parts after the bitmasks; false if a history that is needed did not fit. All threads; the slice is complete before, and after.
  __device__ __forceinline__ bool apply() const {
    __syncthreads();
    if (params.bias_indptr != nullptr) {
      add_bias();
      __syncthreads();
    }
    if (params.seen == nullptr) return true;
    if (params.repetition != nullptr) {
      const float factor = static_cast<const float*>(params.repetition)[at.place];
      if (factor != 1.0f) repeat(factor);
      __syncthreads();
    }
    const float frequency = params.frequency == nullptr ? 0.0f : static_cast<const float*>(params.frequency)[at.place];
    const float presence = params.presence == nullptr ? 0.0f : static_cast<const float*>(params.presence)[at.place];
    if (frequency == 0.0f && presence == 0.0f) return true;
    const int num_entries = static_cast<const int*>(params.num_entries)[at.history];
    if (num_entries > params.capacity) return false;
    subtract_counts(num_entries, frequency, presence);
    __syncthreads();
    return true;
  }
};

// This thread's part of a patched slice, `num_tokens` of whose places are in the vocabulary, rounded to the logits' type and
// divided by `temperature`. Returns its extremes.
template <class Config>
__device__ __forceinline__ Extremes settle_slice(float* slice, int num_tokens, float temperature) {
  using T = typename Config::Dtype;
  Extremes found = {minus_infinity(), -minus_infinity()};
  const bool divide = temperature != 1.0f;
  for_each_four<Config, 1>(slice, [&](int place, float4 four) {
    Pack<float, 16> part = {{four.x, four.y, four.z, four.w}};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if constexpr (sizeof(T) < 4) part.data[e] = to_float(from_float<T>(part.data[e]));
      if (divide) part.data[e] = __fdiv_rn(part.data[e], temperature);
      if (place + e < num_tokens) {
        found.largest = ptx::max_or_nan(found.largest, part.data[e]);
        if (Config::kSmallest) found.smallest = fminf(found.smallest, part.data[e]);
      }
    }
    if ((sizeof(T) < 4 || divide) && place != kNoPlace) store_pack(slice + place, part);
  });
  return found;
}

}  // namespace fi
