// fi_core.PenaltyParams applied to a part of a row in shared memory: the sparse parts as patches of single tokens by the block that
// holds them, then the bitmasks in the pass that finds the row's extremes.
//
// Config: kDense: counts of tokens are dense and none of this header's concern.
// Params: allowed, step_allowed (int32 masks, rows of allowed_stride and step_allowed_stride words); bias_indptr, bias_tokens,
// bias_values, bias_until; repetition, frequency, presence; history_rows; of the histories seen (seen_stride words a row),
// entries (pairs of token and count, entry_stride words a row, capacity pairs), num_entries, num_output. Null: not used.
#pragma once

#include "fi/sampling/row.cuh"

namespace fi {

// What a block keeps in shared memory of a row's columns, and bits of its `kTokens` tokens.
template <int kTokens>
struct PenaltyShared {
  static_assert(kTokens % 32 == 0);
  alignas(16) int columns[4];  // repetition, frequency and presence, floats, and the number of the history's entries
  unsigned allowed[kTokens / 32];  // those that stay; of words in the vocabulary
};

// A block's part of a row, the tokens from `first_token` (a multiple of 32) on, for an output in place `slot` of the columns. What
// the patches need comes with the row: masks into shared memory, all else that is this thread's into registers.
template <class Config, class Params>
struct PenaltyPatch {
  static constexpr int kThreads = Config::kNumThreads, kTokens = RowShape<Config>::kBlockTokens, kWords = kTokens / 32;
  static constexpr int kWordsEach = (kWords + kThreads - 1) / kThreads;
  static constexpr int kEntriesEach = kThreads < 512 ? 512 / kThreads : 1;
  static constexpr int kColumns = 4;

  const Params& params;
  PenaltyShared<kTokens>& shared;
  float* slice;
  int first_token, num_tokens;
  int place, history, bias_begin, bias_end;
  // What is this thread's: words of bits, 32 tokens from threadIdx.x * 32 on and from kThreads * 32 further on; the first entries of
  // the history; its first bias; one of the scalars.
  unsigned allowed_words[kWordsEach], step_words[kWordsEach], seen[kWordsEach];
  int2 counted[kEntriesEach];
  int biased = -1;
  float bias = 0.0f;
  int scalar = 0;

  __device__ __forceinline__ PenaltyPatch(const Params& params, PenaltyShared<kTokens>& shared, float* slice, int first_token)
      : params(params),
        shared(shared),
        slice(slice),
        first_token(first_token),
        num_tokens(max(0, min(params.vocab_size - first_token, kTokens))) {}

  // By all threads. No load waits for another, nor stands in a branch: where branches meet again, all of their loads are waited for.
  __device__ __forceinline__ void ask(int output, int64 slot) {
    const int thread = static_cast<int>(threadIdx.x);
    const int column = kThreads - 1 - thread;  // of the scalars, one a thread
    const void* values = column == 0   ? params.repetition
                         : column == 1 ? params.frequency
                         : column == 2 ? params.presence
                         : column == 3 ? params.num_entries
                                       : nullptr;
    const bool has_one = has_history() && values != nullptr;
    place = slot < 0 ? 0 : static_cast<int>(slot);
    history = params.history_rows == nullptr ? place : static_cast<const int*>(params.history_rows)[output];
    load_words(seen, 0, has_history() && params.repetition != nullptr, params.seen, history, params.seen_stride);
    const int2* entries = entries_of(history) + thread;
#pragma unroll
    for (int idx = 0; idx < kEntriesEach; ++idx) {
      const bool is_one = has_history() && thread + idx * kThreads < params.capacity;
      counted[idx] = is_one ? entries[idx * kThreads] : make_int2(-1, 0);
    }
    scalar = has_one ? static_cast<const int*>(values)[column == 3 ? history : place] : column == 0 ? __float_as_int(1.0f) : 0;
    load_words(allowed_words, 0xffffffffu, params.allowed != nullptr, params.allowed, place, params.allowed_stride);
    load_words(step_words, 0xffffffffu, params.step_allowed != nullptr, params.step_allowed, output, params.step_allowed_stride);
    const int* indptr = static_cast<const int*>(params.bias_indptr) + place;
    bias_begin = params.bias_indptr != nullptr ? indptr[0] : 0;
    bias_end = params.bias_indptr != nullptr ? indptr[1] : 0;
  }

  // This part's words of row `row` of a table of bits that are this thread's; `none` where it has none.
  __device__ __forceinline__ void load_words(unsigned (&words)[kWordsEach], unsigned none, bool used, const void* table, int row,
                                             int64 stride) const {
    const unsigned* from = static_cast<const unsigned*>(table) + row * stride + static_cast<unsigned>(first_token) / 32 + threadIdx.x;
#pragma unroll
    for (int idx = 0; idx < kWordsEach; ++idx) words[idx] = used && has_word(idx) ? from[idx * kThreads] : none;
  }

  // Then, by all threads; what it stores in shared memory is there after the next barrier.
  __device__ __forceinline__ void keep() {
    asm volatile("" : "+r"(bias_begin));  // no sum with it, and so no wait, before here
    const int mine = bias_begin + static_cast<int>(threadIdx.x);
    if (mine < bias_end) {
      biased = static_cast<const int*>(params.bias_tokens)[mine];
      bias = bias_at(history, mine);
    }
#pragma unroll
    for (int idx = 0; idx < kWordsEach; ++idx) {
      if (has_word(idx)) shared.allowed[threadIdx.x + idx * kThreads] = allowed_words[idx] & step_words[idx];
    }
    const int column = kThreads - 1 - static_cast<int>(threadIdx.x);
    if (column < kColumns) shared.columns[column] = has_history() ? scalar : column == 0 ? __float_as_int(1.0f) : 0;
  }

  // Whether the vocabulary has tokens in this thread's word `idx`.
  __device__ __forceinline__ bool has_word(int idx) const {
    return static_cast<int>(threadIdx.x + idx * kThreads) * 32 < num_tokens;
  }
  __device__ __forceinline__ const int2* entries_of(int history) const {
    return reinterpret_cast<const int2*>(static_cast<const int*>(params.entries) + history * params.entry_stride);
  }

  __device__ __forceinline__ bool has_history() const { return !Config::kDense && params.seen != nullptr; }
  __device__ __forceinline__ float bias_at(int history, int entry) const {
    const float value = static_cast<const float*>(params.bias_values)[entry];
    const int* until = static_cast<const int*>(params.bias_until);
    const bool early = until != nullptr && static_cast<const int*>(params.num_output)[history] < until[entry];
    return early ? minus_infinity() : value;
  }

  // Bits of the 32 from place / 32 * 32 on, that of `place` lowest. After keep and a barrier.
  __device__ __forceinline__ unsigned allowed(int place) const {
    return shared.allowed[static_cast<unsigned>(place) / 32] >> (place & 31);
  }

  // Calls patch(place) if `token` is in this part.
  template <class Patch>
  __device__ __forceinline__ void if_inside(int token, Patch patch) const {
    // Unsigned, so that tokens before this part, and -1, are beyond it.
    const unsigned at = static_cast<unsigned>(token) - static_cast<unsigned>(first_token);
    if (at < static_cast<unsigned>(num_tokens)) patch(static_cast<int>(at));
  }

  // All parts but the bitmasks, each value rounded after each step, as the reference does. By all threads, which meet here, after
  // keep and the row's arrival. False if the history lacks what is to be counted: the row cannot be drawn from.
  __device__ __forceinline__ bool apply() {
    __syncthreads();
    const int4 columns = *reinterpret_cast<const int4*>(shared.columns);
    const float repetition = __int_as_float(columns.x), frequency = __int_as_float(columns.y), presence = __int_as_float(columns.z);
    const int num_entries = frequency != 0.0f || presence != 0.0f ? columns.w : 0;
    if (bias_begin < bias_end) {
      add_bias();
      __syncthreads();
    }
    if (repetition != 1.0f) {
      repeat(repetition);
      __syncthreads();
    }
    if (num_entries > params.capacity) return false;
    if (num_entries > 0) {
      subtract_counts(num_entries, frequency, presence);
      __syncthreads();
    }
    return true;
  }

  __device__ __forceinline__ void add_bias() const {
    const auto add = [&](int token, float amount) {
      if_inside(token, [&](int at) { slice[at] = __fadd_rn(slice[at], amount); });
    };
    add(biased, bias);
#pragma unroll 1
    for (int entry = bias_begin + static_cast<int>(threadIdx.x) + kThreads; entry < bias_end; entry += kThreads) {
      add(static_cast<const int*>(params.bias_tokens)[entry], bias_at(history, entry));
    }
  }

  // The seen tokens, of which each thread has those of its words. What lies past the vocabulary is NaN and stays so.
  __device__ __forceinline__ void repeat(float repetition) {
    const Divisor divisor(repetition);
    const float least = divisor.moderate ? 1e-18f : -minus_infinity();
    float* from = slice + threadIdx.x * 32;
    // All words in one loop, so that a warp's lanes wait for one another once.
#pragma unroll 1
    for (;;) {
      if (seen[0] == 0) {
        bool more = false;
#pragma unroll
        for (int idx = 1; idx < kWordsEach; ++idx) {
          more |= seen[idx] != 0;
          seen[idx - 1] = seen[idx];
          seen[idx] = 0;
        }
        if (!more) break;
        from += kThreads * 32;
        if (kWordsEach > 2 && seen[0] == 0) continue;
      }
      const int last = 31 - __clz(static_cast<int>(seen[0]));
      seen[0] ^= 1u << last;
      const float number = from[last];
      float value = number > 0.0f ? divisor.quotient(number) : __fmul_rn(number, repetition);
      if (number > 0.0f && !(number > least && number < 1e18f)) value = __fdiv_rn(number, repetition);
      from[last] = value;
    }
  }

  // The first entries that are this thread's have come with the row.
  __device__ __forceinline__ void subtract_counts(int num_entries, float frequency, float presence) const {
    const auto subtract = [&](int2 entry) {
      if_inside(entry.x, [&](int at) {
        slice[at] = __fsub_rn(__fsub_rn(slice[at], __fmul_rn(frequency, static_cast<float>(entry.y))), presence);
      });
    };
#pragma unroll
    for (int idx = 0; idx < kEntriesEach; ++idx) {
      const bool is_one = static_cast<int>(threadIdx.x) + idx * kThreads < num_entries;
      subtract(make_int2(is_one ? counted[idx].x : -1, counted[idx].y));
    }
#pragma unroll 1
    for (int entry = static_cast<int>(threadIdx.x) + kEntriesEach * kThreads; entry < num_entries; entry += kThreads) {
      subtract(entries_of(history)[entry]);
    }
  }

  // After apply, this thread's part: rounded to the logits' type, divided by `temperature`, and -inf where the bitmasks say so.
  // Returns its extremes.
  __device__ __forceinline__ Extremes settle(float temperature) const {
    using Shape = RowShape<Config>;
    Extremes found = {minus_infinity(), -minus_infinity()};
    const Divisor divisor(temperature);
    const bool divided = temperature != 1.0f;
    int round = 0;
    if (static_cast<int>(threadIdx.x / 32 + 1) * Shape::kWarpTokens <= num_tokens) {
      if (divided) settle_full_rounds<true>(found, divisor);
      else settle_full_rounds<false>(found, divisor);
      round = Shape::kFullRounds;
    }
#pragma unroll 1
    for (; round < Shape::kRounds; ++round) settle_four(found, divisor, divided, place_of_round<Config>(round));
    return found;
  }

  // Without bounds, a mask's word beside each four tokens.
  template <bool kDivided>
  __device__ __forceinline__ void settle_full_rounds(Extremes& found, const Divisor& divisor) const {
    const int first = place_of_full_round<Config>(0);
    const unsigned* words = shared.allowed + first / 32;
    const unsigned turn = (first - 1) & 31;  // which leaves the four tokens' bits in places 1 to 4, where one instruction tests all
#pragma unroll kDivided ? 1 : 4
    for (int round = 0; round < RowShape<Config>::kFullRounds; ++round) {
      float* place = slice + first + round * 128;
      const float4 four = *reinterpret_cast<const float4*>(place);
      Pack<float, 16> part = {{four.x, four.y, four.z, four.w}};
      round_off(part.data);
      if (kDivided) divisor.divide(part.data);
      mask<1>(part.data, __funnelshift_r(words[round * 4], words[round * 4], turn));
#pragma unroll
      for (int e = 0; e < 4; ++e) found.template take<Config>(part.data[e]);
      store_pack(place, part);
    }
  }

  __device__ __forceinline__ void settle_four(Extremes& found, const Divisor& divisor, bool divided, int place) const {
    const int left = num_tokens - place;  // of the vocabulary; what lies behind it stays as it is
    if (left <= 0) return;
    const float4 four = *reinterpret_cast<const float4*>(slice + place);
    Pack<float, 16> part = {{four.x, four.y, four.z, four.w}};
    round_off(part.data);
    if (divided) divisor.divide(part.data);
    mask<0>(part.data, allowed(place) | (left < 4 ? ~0u << left : 0));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e < left) found.template take<Config>(part.data[e]);
    }
    store_pack(slice + place, part);
  }

  __device__ __forceinline__ static void round_off(float (&numbers)[4]) {
    using T = typename Config::Dtype;
    if constexpr (sizeof(T) < 4) {
#pragma unroll
      for (int e = 0; e < 4; ++e) numbers[e] = to_float(from_float<T>(numbers[e]));
    }
  }
  // `stays`: their bits, from place kFirst on.
  template <int kFirst>
  __device__ __forceinline__ static void mask(float (&numbers)[4], unsigned stays) {
#pragma unroll
    for (int e = 0; e < 4; ++e) numbers[e] = stays & 1u << (kFirst + e) ? numbers[e] : minus_infinity();
  }
};

// How a row with penalties is loaded.
template <class Config, class Params>
struct PenaltyStage {
  static constexpr bool kChanges = true;
  PenaltyPatch<Config, Params>& patch;
  int output;
  int64 slot;

  __device__ __forceinline__ void begun() {
    patch.ask(output, slot);
    patch.keep();
  }
};

}  // namespace fi
