// fi_core.PenaltyParams applied to a part of a row in shared memory: the bitmasks while it is loaded, the sparse rest as
// patches of single tokens by the block that holds them.
//
// Params: allowed, step_allowed (int32 masks, rows of allowed_stride and step_allowed_stride words); bias_indptr, bias_tokens,
// bias_values, bias_until; repetition, frequency, presence; history_rows; of the histories seen (seen_stride words a row),
// entries (pairs of token and count, entry_stride words a row, capacity pairs), num_entries, num_output. Null: not used.
#pragma once

#include "fi/sampling/row.cuh"

namespace fi {

// What a block reads of a row's columns once, in shared memory.
struct PenaltyScalars {
  int bias_begin, bias_end, num_entries;
  float repetition, frequency, presence;

  // Whether all that is to be counted is in the history.
  __device__ __forceinline__ bool fits(int capacity) const {
    return (frequency == 0.0f && presence == 0.0f) || num_entries <= capacity;
  }
};

// An output's rows of the columns.
template <class Params>
struct PenaltyRow {
  int place, history;
  PenaltyScalars* scalars;

  // `slot` may still be under way; so is what one thread reads here, behind the row's loads.
  __device__ __forceinline__ void find(const Params& params, int output, int64 slot) {
    place = slot > 0 ? static_cast<int>(slot) : 0;
    history = params.history_rows == nullptr ? place : static_cast<const int*>(params.history_rows)[output];
    if (threadIdx.x != 0) return;
    const int* indptr = static_cast<const int*>(params.bias_indptr);
    scalars->bias_begin = indptr == nullptr ? 0 : indptr[place];
    scalars->bias_end = indptr == nullptr ? 0 : indptr[place + 1];
    scalars->repetition = value_of(params.repetition, 1.0f);
    scalars->frequency = value_of(params.frequency, 0.0f);
    scalars->presence = value_of(params.presence, 0.0f);
    scalars->num_entries = params.seen == nullptr ? 0 : static_cast<const int*>(params.num_entries)[history];
  }

  __device__ __forceinline__ float value_of(const void* column, float none) const {
    return column == nullptr ? none : static_cast<const float*>(column)[place];
  }

  // Bits of the tokens that are allowed, of the 32 around `token`.
  __device__ __forceinline__ unsigned word(const Params& params, int output, int token) const {
    unsigned bits = 0xffffffffu;
    if (params.allowed != nullptr) bits = word_of(params.allowed, place * params.allowed_stride, token);
    if (params.step_allowed != nullptr) bits &= word_of(params.step_allowed, output * params.step_allowed_stride, token);
    return bits;
  }

  __device__ __forceinline__ static unsigned word_of(const void* masks, int64 row, int token) {
    return __ldg(static_cast<const unsigned*>(masks) + row + token / 32);
  }
};

struct NoPenalties {};

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

  // Whether what it stores is NaN, which makes the row unusable.
  __device__ __forceinline__ bool store(int place, float value) const {
    slice[place] = value;
    return value != value;
  }

  __device__ __forceinline__ bool add_bias() const {
    bool spoilt = false;
    const int* tokens = static_cast<const int*>(params.bias_tokens);
    const int* until = static_cast<const int*>(params.bias_until);
    const int made = until == nullptr ? 0 : static_cast<const int*>(params.num_output)[at.history];
    for_each(at.scalars->bias_begin, at.scalars->bias_end, [&](int entry) { return __ldg(tokens + entry); }, [&](int place, int entry) {
      float value = static_cast<const float*>(params.bias_values)[entry];
      if (until != nullptr && made < until[entry]) value = minus_infinity();
      spoilt |= store(place, slice[place] + value);
    });
    return spoilt;
  }

  // A lane takes a word at a time, and its tokens one by one: few of a word's 32 tokens were seen.
  __device__ __forceinline__ bool repeat(float factor) const {
    bool spoilt = false;
    const unsigned* seen = static_cast<const unsigned*>(params.seen) + at.history * params.seen_stride + first_token / 32;
#pragma unroll 1
    for (int word = static_cast<int>(threadIdx.x); word * 32 < num_tokens; word += kThreads) {
      unsigned bits = __ldg(seen + word);
#pragma unroll 1
      while (bits != 0) {
        const int place = word * 32 + __ffs(static_cast<int>(bits)) - 1;
        bits &= bits - 1;
        if (place >= num_tokens) break;
        const float value = slice[place];
        spoilt |= store(place, value > 0.0f ? __fdiv_rn(value, factor) : value * factor);
      }
    }
    return spoilt;
  }

  __device__ __forceinline__ bool subtract_counts() const {
    bool spoilt = false;
    const int2* entries = reinterpret_cast<const int2*>(static_cast<const int*>(params.entries) + at.history * params.entry_stride);
    const float frequency = at.scalars->frequency, presence = at.scalars->presence;
    for_each(0, at.scalars->num_entries, [&](int entry) { return entries[entry].x; }, [&](int place, int entry) {
      // Rounded after each step, as the reference does.
      const float count = static_cast<float>(entries[entry].y);
      spoilt |= store(place, __fsub_rn(__fsub_rn(slice[place], __fmul_rn(frequency, count)), presence));
    });
    return spoilt;
  }

  // All parts after the bitmasks; false, in all threads or in one, if the row cannot be drawn from: a history that is needed did
  // not fit, or a value is NaN. All threads; the slice is complete before, and after.
  __device__ __forceinline__ bool apply() const {
    bool spoilt = false;
    __syncthreads();
    const PenaltyScalars& scalars = *at.scalars;
    if (scalars.bias_begin < scalars.bias_end) {
      spoilt |= add_bias();
      __syncthreads();
    }
    if (params.seen != nullptr && scalars.repetition != 1.0f) {
      spoilt |= repeat(scalars.repetition);
      __syncthreads();
    }
    if (params.seen == nullptr || (scalars.frequency == 0.0f && scalars.presence == 0.0f)) return !spoilt;
    if (!scalars.fits(params.capacity)) return false;
    spoilt |= subtract_counts();
    __syncthreads();
    return !spoilt;
  }
};

// This thread's part of a patched slice, rounded to the logits' type and divided by `temperature`; returns its extremes, of which
// the largest is NaN only if that of `loaded`, from before the patches, is. Places past the vocabulary hold NaN, which both ignore.
template <class Config>
__device__ __forceinline__ Extremes settle_slice(float* slice, Extremes loaded, float temperature) {
  using T = typename Config::Dtype;
  Extremes found = {minus_infinity(), -minus_infinity()};
  const bool divide = temperature != 1.0f;
  for_each_four<Config, 2>(slice, [&](int place, float4 four) {
    Pack<float, 16> part = {{four.x, four.y, four.z, four.w}};
    if (sizeof(T) < 4 || divide) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if constexpr (sizeof(T) < 4) part.data[e] = to_float(from_float<T>(part.data[e]));
        if (divide) part.data[e] = __fdiv_rn(part.data[e], temperature);
      }
      if (place != kNoPlace) store_pack(slice + place, part);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      found.largest = fmaxf(found.largest, part.data[e]);
      if (Config::kSmallest) found.smallest = fminf(found.smallest, part.data[e]);
    }
  });
  if (loaded.largest != loaded.largest) found.largest = loaded.largest;
  return found;
}

}  // namespace fi
