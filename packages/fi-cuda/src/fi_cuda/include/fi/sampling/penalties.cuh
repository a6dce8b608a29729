// fi_core.PenaltyParams applied to a part of a row in shared memory: the sparse parts as patches of single tokens by the block that
// holds them, then the bitmasks in the pass that finds the row's extremes.
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
  unsigned allowed[kTokens / 32];  // those that stay, and all places past the vocabulary
  unsigned seen[kTokens / 32];     // those of prompt and output
};

// A block's part of a row, the tokens from `first_token` (a multiple of 32) on, for an output in place `slot` of the columns. What
// the patches need comes with the row: bits into shared memory, the first entry of each list that is this thread's into registers.
template <class Config, class Params>
struct PenaltyPatch {
  static constexpr int kThreads = Config::kNumThreads, kTokens = RowShape<Config>::kBlockTokens, kWords = kTokens / 32;
  static constexpr int kWordsEach = (kWords + kThreads - 1) / kThreads;

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

  // By all threads; what it stores in shared memory is there after the next barrier.
  __device__ __forceinline__ void prepare(int output, int64 slot) {
    const int place = slot > 0 ? static_cast<int>(slot) : 0;
    const int history = params.history_rows == nullptr ? place : static_cast<const int*>(params.history_rows)[output];
    const int* indptr = static_cast<const int*>(params.bias_indptr);
    const int begin = indptr == nullptr ? 0 : indptr[place], end = indptr == nullptr ? 0 : indptr[place + 1];
    unsigned allowed[kWordsEach], seen[kWordsEach];
#pragma unroll
    for (int idx = 0; idx < kWordsEach; ++idx) {
      const int word = static_cast<int>(threadIdx.x) + idx * kThreads;
      const bool inside = word * 32 < num_tokens;
      allowed[idx] = inside ? allowed_word(output, place, first_token + word * 32) : 0;
      seen[idx] = inside && params.seen != nullptr ? seen_words(history)[word] : 0;
    }
    if (params.seen != nullptr && static_cast<int>(threadIdx.x) < params.capacity) {
      counted = entry_at(history, static_cast<int>(threadIdx.x));
    }
    if (threadIdx.x == kThreads - 1) {  // the first has the row's other parameters to load
      const int num_entries = params.seen == nullptr ? 0 : static_cast<const int*>(params.num_entries)[history];
      shared.place = place;
      shared.history = history;
      shared.bias_begin = begin;
      shared.bias_end = end;
      shared.num_entries = num_entries;
      shared.repetition = value_of(params.repetition, place, 1.0f);
      shared.frequency = value_of(params.frequency, place, 0.0f);
      shared.presence = value_of(params.presence, place, 0.0f);
    }
    const int mine = begin + static_cast<int>(threadIdx.x);
    if (mine < end) {
      biased = static_cast<const int*>(params.bias_tokens)[mine];
      bias = bias_at(history, mine);
    }
#pragma unroll
    for (int idx = 0; idx < kWordsEach; ++idx) {
      const int word = static_cast<int>(threadIdx.x) + idx * kThreads;
      const int left = num_tokens - word * 32;
      if (left <= 0) continue;
      shared.allowed[word] = left < 32 ? allowed[idx] | 0xffffffffu << left : allowed[idx];
      shared.seen[word] = left < 32 ? seen[idx] & ~(0xffffffffu << left) : seen[idx];
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

  // Bits of the 32 from place / 32 * 32 on, that of `place` lowest. After prepare and a barrier.
  __device__ __forceinline__ unsigned allowed(int place) const { return shared.allowed[place / 32] >> (place & 31); }

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

  // Calls patch(place) for the seen tokens. A lane takes a word at a time, and its tokens one by one: few of a word's 32 are set.
  template <class Patch>
  __device__ __forceinline__ void for_each_seen(Patch patch) const {
#pragma unroll 1
    for (int word = static_cast<int>(threadIdx.x); word * 32 < num_tokens; word += kThreads) {
#pragma unroll 1
      for (unsigned bits = shared.seen[word]; bits != 0; bits &= bits - 1) {
        patch(word * 32 + __ffs(static_cast<int>(bits)) - 1);
      }
    }
  }

  // Whether all that is to be counted is in the history: if not, the row cannot be drawn from. After prepare and a barrier.
  __device__ __forceinline__ bool counts() const {
    return params.seen != nullptr && (shared.frequency != 0.0f || shared.presence != 0.0f);
  }
  __device__ __forceinline__ bool fits() const { return !counts() || shared.num_entries <= params.capacity; }

  // All parts but the bitmasks, each value rounded after each step, as the reference does. By all threads, which meet here, after
  // prepare and the row's arrival.
  __device__ __forceinline__ void apply() const {
    __syncthreads();
    const int begin = shared.bias_begin, end = shared.bias_end, history = shared.history;
    if (begin < end) {
      const int* tokens = static_cast<const int*>(params.bias_tokens);
      for_each(begin, end, biased, [&](int entry) { return tokens[entry]; }, [&](int at, int entry) {
        const bool first = entry == begin + static_cast<int>(threadIdx.x);
        slice[at] = __fadd_rn(slice[at], first ? bias : bias_at(history, entry));
      });
      __syncthreads();
    }
    const float repetition = shared.repetition;
    if (params.seen != nullptr && repetition != 1.0f) {
      for_each_seen([&](int at) {
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

  // After apply, this thread's part: rounded to the logits' type, divided by `temperature`, and -inf where the bitmasks say so.
  // Returns its extremes.
  __device__ __forceinline__ Extremes settle(float temperature) const {
    using T = typename Config::Dtype;
    Extremes found = {minus_infinity(), -minus_infinity()};
    const Divisor divisor(temperature);
    for_each_four<Config, 2>(slice, [&](int place, float4 four) {
      const int left = num_tokens - place;  // of the vocabulary; what lies behind it stays as it is
      if (left <= 0) return;
      Pack<float, 16> part = {{four.x, four.y, four.z, four.w}};
      if constexpr (sizeof(T) < 4) {
#pragma unroll
        for (int e = 0; e < 4; ++e) part.data[e] = to_float(from_float<T>(part.data[e]));
      }
      if (temperature != 1.0f) divisor.divide(part.data);
      const unsigned stays = allowed(place);
#pragma unroll
      for (int e = 0; e < 4; ++e) part.data[e] = stays >> e & 1 ? part.data[e] : minus_infinity();
      if (left >= 4) {
#pragma unroll
        for (int e = 0; e < 4; ++e) found.template take<Config>(part.data[e]);
      } else {
#pragma unroll 1
        for (int e = 0; e < left; ++e) found.template take<Config>(e == 0 ? part.data[0] : e == 1 ? part.data[1] : part.data[2]);
      }
      store_pack(slice + place, part);
    });
    return found;
  }
};

// How a row with penalties is loaded.
template <class Config, class Params>
struct PenaltyStage {
  static constexpr bool kChanges = true, kListsFirst = false;
  PenaltyPatch<Config, Params>& patch;
  int output;
  int64 slot;

  __device__ __forceinline__ void asked() {
    if (kListsFirst) patch.prepare(output, slot);
  }
  __device__ __forceinline__ void begun() {
    if (!kListsFirst) patch.prepare(output, slot);
  }
};

}  // namespace fi
