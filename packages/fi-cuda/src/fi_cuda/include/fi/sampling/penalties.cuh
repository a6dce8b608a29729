// fi_core.PenaltyParams applied to a part of a row in shared memory: the bitmasks as the thread that loaded a token passes it, the
// sparse rest as patches of single tokens by the block that holds them.
//
// Params: allowed, step_allowed (int32 masks, rows of allowed_stride and step_allowed_stride words); bias_indptr, bias_tokens,
// bias_values, bias_until; repetition, frequency, presence; history_rows; of the histories seen (seen_stride words a row),
// entries (pairs of token and count, entry_stride words a row, capacity pairs), num_entries, num_output. Null: not used.
#pragma once

#include "fi/sampling/row.cuh"

namespace fi {

// What a block keeps of a row's columns in shared memory: scalars, and bits of its `kTokens` tokens.
template <int kTokens>
struct PenaltyShared {
  static_assert(kTokens % 32 == 0);
  int place, history;  // rows of the columns
  int bias_begin, bias_end, num_entries;
  float repetition, frequency, presence;
  unsigned allowed[kTokens / 32];  // those that stay
  unsigned patched[kTokens / 32];  // those that patches change: they count among the extremes only then
};

// A block's part of a row, the tokens from `first_token` (a multiple of 32) on. What the patches need is asked for while the row
// is under way: the first entries of each list, one a thread, wait in registers.
template <class Config, class Params>
struct PenaltyPatch {
  static constexpr int kThreads = Config::kNumThreads, kTokens = RowShape<Config>::kBlockTokens, kWords = kTokens / 32;

  const Params& params;
  PenaltyShared<kTokens>& shared;
  float* slice;
  int first_token, num_tokens;
  int biased = -1;  // the token of this thread's first bias, and what is added
  float bias = 0.0f;
  int2 counted = {-1, 0};  // this thread's first entry of the history

  __device__ __forceinline__ PenaltyPatch(const Params& params, PenaltyShared<kTokens>& shared, float* slice, int first_token)
      : params(params),
        shared(shared),
        slice(slice),
        first_token(first_token),
        num_tokens(max(0, min(params.vocab_size - first_token, kTokens))) {}

  // By all threads, which meet here, for an output in place `slot` of the columns.
  __device__ __forceinline__ void prepare(int output, int64 slot) {
    const int place = slot > 0 ? static_cast<int>(slot) : 0;
    const int history = params.history_rows == nullptr ? place : static_cast<const int*>(params.history_rows)[output];
    const int* indptr = static_cast<const int*>(params.bias_indptr);
    const int begin = indptr == nullptr ? 0 : indptr[place], end = indptr == nullptr ? 0 : indptr[place + 1];
    const float repetition = value_of(params.repetition, place, 1.0f);
    const float frequency = value_of(params.frequency, place, 0.0f), presence = value_of(params.presence, place, 0.0f);
    if (params.seen != nullptr && static_cast<int>(threadIdx.x) < params.capacity) {
      counted = entry_at(history, static_cast<int>(threadIdx.x));
    }
    if (threadIdx.x == 0) {
      const int num_entries = params.seen == nullptr ? 0 : static_cast<const int*>(params.num_entries)[history];
      shared.place = place;
      shared.history = history;
      shared.bias_begin = begin;
      shared.bias_end = end;
      shared.num_entries = num_entries;
      shared.repetition = repetition;
      shared.frequency = frequency;
      shared.presence = presence;
    }
#pragma unroll 1
    for (int word = static_cast<int>(threadIdx.x); word < kWords; word += kThreads) {
      const bool inside = word * 32 < num_tokens;
      const unsigned seen = inside && params.seen != nullptr ? seen_words(history)[word] : 0;
      const bool matters = repetition != 1.0f || frequency != 0.0f || presence != 0.0f;
      shared.allowed[word] = inside ? allowed_word(output, place, first_token + word * 32) : 0;
      shared.patched[word] = matters ? seen : 0;
    }
    const int mine = begin + static_cast<int>(threadIdx.x);
    if (mine < end) {
      biased = static_cast<const int*>(params.bias_tokens)[mine];
      bias = bias_at(history, mine);
    }
    __syncthreads();
    if (begin < end) {
      for_each(begin, end, biased, bias_token(), [&](int at, int) { atomicOr(&shared.patched[at / 32], 1u << (at & 31)); });
      __syncthreads();
    }
  }

  __device__ __forceinline__ float value_of(const void* column, int place, float none) const {
    return column == nullptr ? none : static_cast<const float*>(column)[place];
  }
  __device__ __forceinline__ const unsigned* seen_words(int history) const {
    return static_cast<const unsigned*>(params.seen) + history * params.seen_stride + first_token / 32;
  }
  __device__ __forceinline__ int2 entry_at(int history, int entry) const {
    return reinterpret_cast<const int2*>(static_cast<const int*>(params.entries) + history * params.entry_stride)[entry];
  }
  __device__ __forceinline__ float bias_at(int history, int entry) const {
    const float value = static_cast<const float*>(params.bias_values)[entry];
    const int* until = static_cast<const int*>(params.bias_until);
    const bool early = until != nullptr && static_cast<const int*>(params.num_output)[history] < until[entry];
    return early ? minus_infinity() : value;
  }
  __device__ __forceinline__ auto bias_token() const {
    return [tokens = static_cast<const int*>(params.bias_tokens)](int entry) { return tokens[entry]; };
  }

  // Bits of the tokens that are allowed, of the 32 from `token` on.
  __device__ __forceinline__ unsigned allowed_word(int output, int place, int token) const {
    unsigned bits = 0xffffffffu;
    if (params.allowed != nullptr) bits = word_of(params.allowed, place * params.allowed_stride, token);
    if (params.step_allowed != nullptr) bits &= word_of(params.step_allowed, output * params.step_allowed_stride, token);
    return bits;
  }
  __device__ __forceinline__ static unsigned word_of(const void* masks, int64 row, int token) {
    return __ldg(static_cast<const unsigned*>(masks) + row + token / 32);
  }

  // Calls patch(place, entry) for those of the entries from `begin` to `end` whose token is in this part: `first` is that of this
  // thread's first entry, token_of(entry) that of another.
  template <class TokenOf, class Patch>
  __device__ __forceinline__ void for_each(int begin, int end, int first, TokenOf token_of, Patch patch) const {
#pragma unroll 1
    for (int entry = begin + static_cast<int>(threadIdx.x), token = first; entry < end;) {
      // Unsigned, so that tokens before this part, and -1, are beyond it.
      const unsigned at = static_cast<unsigned>(token) - static_cast<unsigned>(first_token);
      if (at < static_cast<unsigned>(num_tokens)) patch(static_cast<int>(at), entry);
      entry += kThreads;
      if (entry < end) token = token_of(entry);
    }
  }

  // Calls patch(place) for the tokens with a bit in bits_of(word). A lane takes a word at a time, and its tokens one by one: few
  // of a word's 32 are set.
  template <class BitsOf, class Patch>
  __device__ __forceinline__ void for_each_bit(BitsOf bits_of, Patch patch) const {
#pragma unroll 1
    for (int word = static_cast<int>(threadIdx.x); word * 32 < num_tokens; word += kThreads) {
      unsigned bits = bits_of(word);
#pragma unroll 1
      while (bits != 0) {
        const int at = word * 32 + __ffs(static_cast<int>(bits)) - 1;
        bits &= bits - 1;
        if (at < num_tokens) patch(at);
      }
    }
  }

  // Whether all that is to be counted is in the history: if not, the row cannot be drawn from. After prepare.
  __device__ __forceinline__ bool counts() const {
    return params.seen != nullptr && (shared.frequency != 0.0f || shared.presence != 0.0f);
  }
  __device__ __forceinline__ bool fits() const { return !counts() || shared.num_entries <= params.capacity; }

  // All parts after the bitmasks, each value rounded after each step, as the reference does. All threads; the slice is complete
  // before, and after but for a barrier.
  __device__ __forceinline__ void apply() const {
    __syncthreads();
    const int begin = shared.bias_begin, end = shared.bias_end, history = shared.history;
    if (begin < end) {
      for_each(begin, end, biased, bias_token(), [&](int at, int entry) {
        const bool first = entry == begin + static_cast<int>(threadIdx.x);
        slice[at] = __fadd_rn(slice[at], first ? bias : bias_at(history, entry));
      });
      __syncthreads();
    }
    const float repetition = shared.repetition;
    if (params.seen != nullptr && repetition != 1.0f) {
      for_each_bit([words = seen_words(history)](int word) { return __ldg(words + word); }, [&](int at) {
        const float value = slice[at];
        slice[at] = value > 0.0f ? __fdiv_rn(value, repetition) : __fmul_rn(value, repetition);
      });
      __syncthreads();
    }
    if (!counts() || !fits()) return;
    const float frequency = shared.frequency, presence = shared.presence;
    for_each(0, shared.num_entries, counted.x, [&](int entry) { return entry_at(history, entry).x; }, [&](int at, int entry) {
      const bool first = entry == static_cast<int>(threadIdx.x);
      const float count = static_cast<float>(first ? counted.y : entry_at(history, entry).y);
      slice[at] = __fsub_rn(__fsub_rn(slice[at], __fmul_rn(frequency, count)), presence);
    });
    __syncthreads();
  }

  // After apply: the patched tokens rounded to the logits' type; with `found`, the extremes of the others, returns those of all.
  // All threads, which meet here.
  __device__ __forceinline__ Extremes settle(Extremes found) const {
    using T = typename Config::Dtype;
    for_each_bit([&](int word) { return shared.patched[word]; }, [&](int at) {
      float value = slice[at];
      if constexpr (sizeof(T) < 4) slice[at] = value = to_float(from_float<T>(value));
      found.template take<Config>(value);
    });
    __syncthreads();
    return found;
  }
};

// How a row with penalties is loaded.
template <class Config, class Params>
struct PenaltyStage {
  static constexpr bool kMasks = true;
  PenaltyPatch<Config, Params>& patch;
  int output;
  int64 slot;

  __device__ __forceinline__ void begun() { patch.prepare(output, slot); }
  __device__ __forceinline__ unsigned allowed(int place) const { return patch.shared.allowed[place / 32] >> (place & 31); }
  __device__ __forceinline__ unsigned patched(int place) const { return patch.shared.patched[place / 32] >> (place & 31); }
};

}  // namespace fi
