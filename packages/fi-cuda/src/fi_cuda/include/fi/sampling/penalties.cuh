// fi_core.PenaltyParams applied to a part of a row in shared memory: the sparse parts as patches of single tokens by the block that
// holds them, then the bitmasks in the pass that finds the row's extremes.
//
// Config: kDense: counts of tokens are dense and none of this header's concern.
// Params: allowed, step_allowed (int32 masks, rows of allowed_stride and step_allowed_stride words); bias_indptr, bias_tokens,
// bias_values, bias_until; repetition, frequency, presence; history_rows; of the histories seen (seen_stride words a row),
// entries (pairs of token and count, entry_stride words a row, capacity pairs), num_entries, num_output. Null: not used.
#pragma once

#include "fi/sampling/row.cuh"
#include "fi/tile/scan.cuh"

namespace fi {

// What a block keeps of a row's columns in shared memory: scalars, and bits of its `kTokens` tokens.
template <int kTokens>
struct PenaltyShared {
  static_assert(kTokens % 32 == 0);
  int place, history;  // rows of the columns
  int bias_begin, bias_end, num_entries;
  float repetition, frequency, presence;
  unsigned allowed[kTokens / 32];       // those that stay, and all places past the vocabulary
  unsigned short seen[kTokens / 8];     // places of those of prompt and output: a part of kSeenOfWarp for each warp's words
};

// A block's part of a row, the tokens from `first_token` (a multiple of 32) on, for an output in place `slot` of the columns. What
// the patches need comes with the row: bits into shared memory, the first entry of each list that is this thread's into registers.
template <class Config, class Params>
struct PenaltyPatch {
  static constexpr int kThreads = Config::kNumThreads, kTokens = RowShape<Config>::kBlockTokens, kWords = kTokens / 32;
  static constexpr int kWordsEach = (kWords + kThreads - 1) / kThreads;
  static constexpr int kEntriesEach = kThreads < 512 ? 512 / kThreads : 1;
  static constexpr int kSeenOfWarp = kTokens / 8 / (kThreads / 32);

  const Params& params;
  PenaltyShared<kTokens>& shared;
  float* slice;
  int first_token, num_tokens;
  int biased = -1;  // the token of this thread's first bias, and what is added
  float bias = 0.0f;
  int2 counted[kEntriesEach];  // this thread's first entries of the history
  int num_seen = 0;            // places on this warp's list; more than kSeenOfWarp: they are not

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
      seen[idx] = inside && has_history() ? seen_words(history)[word] : 0;
    }
#pragma unroll
    for (int idx = 0; idx < kEntriesEach; ++idx) {
      const int entry = static_cast<int>(threadIdx.x) + idx * kThreads;
      counted[idx] = has_history() && entry < params.capacity ? entry_at(history, entry) : make_int2(-1, 0);
    }
    if (threadIdx.x == kThreads - 1) {  // the first has the row's other parameters to load
      const int num_entries = !has_history() ? 0 : static_cast<const int*>(params.num_entries)[history];
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
      if (left > 0) shared.allowed[word] = left < 32 ? allowed[idx] | 0xffffffffu << left : allowed[idx];
      if (left > 0 && left < 32) seen[idx] &= ~(0xffffffffu << left);
    }
    if (has_history() && params.repetition != nullptr) list_seen(seen);
  }

  // The places of this thread's words' bits to its warp's list.
  __device__ __forceinline__ void list_seen(const unsigned (&seen)[kWordsEach]) {
    int mine = 0;
#pragma unroll
    for (int idx = 0; idx < kWordsEach; ++idx) mine += __popc(seen[idx]);
    const Prefix<int> prefix = prefix_over_lanes<32>(mine);
    num_seen = prefix.total;
    if (num_seen > kSeenOfWarp) return;
    unsigned short* to = shared.seen + threadIdx.x / 32 * kSeenOfWarp + prefix.exclusive;
#pragma unroll
    for (int idx = 0; idx < kWordsEach; ++idx) {
      const int first = (static_cast<int>(threadIdx.x) + idx * kThreads) * 32;
#pragma unroll 1
      for (unsigned bits = seen[idx]; bits != 0; bits &= bits - 1) {
        *to++ = static_cast<unsigned short>(first + __ffs(static_cast<int>(bits)) - 1);
      }
    }
  }

  __device__ __forceinline__ bool has_history() const { return !Config::kDense && params.seen != nullptr; }
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

  // Calls patch(place) if `token` is in this part.
  template <class Patch>
  __device__ __forceinline__ void if_inside(int token, Patch patch) const {
    // Unsigned, so that tokens before this part, and -1, are beyond it.
    const unsigned at = static_cast<unsigned>(token) - static_cast<unsigned>(first_token);
    if (at < static_cast<unsigned>(num_tokens)) patch(static_cast<int>(at));
  }

  // Calls patch(place) for the seen tokens in the words that this thread's warp has listed.
  template <class Patch>
  __device__ __forceinline__ void for_each_seen(int history, Patch patch) const {
    if (num_seen <= kSeenOfWarp) {
      const unsigned short* from = shared.seen + threadIdx.x / 32 * kSeenOfWarp;
#pragma unroll 1
      for (int idx = static_cast<int>(threadIdx.x % 32); idx < num_seen; idx += 32) patch(from[idx]);
      return;
    }
#pragma unroll 1
    for (int word = static_cast<int>(threadIdx.x); word * 32 < num_tokens; word += kThreads) {
#pragma unroll 1
      for (unsigned bits = seen_words(history)[word]; bits != 0; bits &= bits - 1) {
        const int at = word * 32 + __ffs(static_cast<int>(bits)) - 1;
        if (at < num_tokens) patch(at);
      }
    }
  }

  // Whether all that is to be counted is in the history: if not, the row cannot be drawn from. After prepare and a barrier.
  __device__ __forceinline__ bool counts() const {
    return has_history() && (shared.frequency != 0.0f || shared.presence != 0.0f);
  }
  __device__ __forceinline__ bool fits() const { return !counts() || shared.num_entries <= params.capacity; }

  // All parts but the bitmasks, each value rounded after each step, as the reference does. By all threads, which meet here, after
  // prepare and the row's arrival.
  __device__ __forceinline__ void apply() const {
    __syncthreads();
    const int begin = shared.bias_begin, end = shared.bias_end, history = shared.history;
    if (begin < end) {
      const auto add = [&](int token, float amount) {
        if_inside(token, [&](int at) { slice[at] = __fadd_rn(slice[at], amount); });
      };
      add(biased, bias);
#pragma unroll 1
      for (int entry = begin + static_cast<int>(threadIdx.x) + kThreads; entry < end; entry += kThreads) {
        add(static_cast<const int*>(params.bias_tokens)[entry], bias_at(history, entry));
      }
      __syncthreads();
    }
    const float repetition = shared.repetition;
    if (has_history() && repetition != 1.0f) {
      const Divisor divisor(repetition);
      for_each_seen(history, [&](int at) {
        const float number = slice[at];
        const float size = fabsf(number);
        float value = __fmul_rn(number, repetition);
        if (number > 0.0f) value = divisor.moderate && size > 1e-18f && size < 1e18f ? divisor.quotient(number) : __fdiv_rn(number, repetition);
        slice[at] = value;
      });
      __syncthreads();
    }
    if (!counts() || !fits()) return;
    const float frequency = shared.frequency, presence = shared.presence;
    const int num_entries = shared.num_entries;
    const auto subtract = [&](int2 entry) {
      if_inside(entry.x, [&](int at) {
        slice[at] = __fsub_rn(__fsub_rn(slice[at], __fmul_rn(frequency, static_cast<float>(entry.y))), presence);
      });
    };
#pragma unroll
    for (int idx = 0; idx < kEntriesEach; ++idx) {
      if (static_cast<int>(threadIdx.x) + idx * kThreads < num_entries) subtract(counted[idx]);
    }
#pragma unroll 1
    for (int entry = static_cast<int>(threadIdx.x) + kEntriesEach * kThreads; entry < num_entries; entry += kThreads) {
      subtract(entry_at(history, entry));
    }
    __syncthreads();
  }

  // After apply, this thread's part: rounded to the logits' type, divided by `temperature`, and -inf where the bitmasks say so.
  // Returns its extremes.
  __device__ __forceinline__ Extremes settle(float temperature) const {
    using Shape = RowShape<Config>;
    Extremes found = {minus_infinity(), -minus_infinity()};
    const Divisor divisor(temperature);
    const bool whole = static_cast<int>(threadIdx.x / 32 + 1) * Shape::kWarpTokens <= num_tokens;
    if (!whole || Shape::kFullRounds == 0) {
      for_each_four<Config, 1>(slice, [&](int place, float4 four) { settle_four(found, divisor, place, four); });
      return found;
    }
    if (temperature == 1.0f) {
      settle_full_rounds<false>(found, divisor);
    } else {
      settle_full_rounds<true>(found, divisor);
    }
    if (Shape::kRounds > Shape::kFullRounds) {
      const int place = place_of_partial_round<Config>();
      settle_four(found, divisor, place, four_behind<Config>(slice, place));
    }
    return found;
  }

  // Without bounds, a mask's word beside each four tokens.
  template <bool kDivided>
  __device__ __forceinline__ void settle_full_rounds(Extremes& found, const Divisor& divisor) const {
    const int first = place_of_full_round<Config>(0);
    const unsigned* words = shared.allowed + first / 32;
#pragma unroll 2
    for (int round = 0; round < RowShape<Config>::kFullRounds; ++round) {
      float* place = slice + first + round * 128;
      const float4 four = *reinterpret_cast<const float4*>(place);
      Pack<float, 16> part = {{four.x, four.y, four.z, four.w}};
      round_off(part.data);
      if (kDivided) divisor.divide(part.data);
      mask(part.data, words[round * 4] >> (first & 31));
#pragma unroll
      for (int e = 0; e < 4; ++e) found.template take<Config>(part.data[e]);
      store_pack(place, part);
    }
  }

  __device__ __forceinline__ void settle_four(Extremes& found, const Divisor& divisor, int place, float4 four) const {
    const int left = num_tokens - place;  // of the vocabulary; what lies behind it stays as it is
    if (left <= 0) return;
    Pack<float, 16> part = {{four.x, four.y, four.z, four.w}};
    round_off(part.data);
    if (divisor.value != 1.0f) divisor.divide(part.data);
    mask(part.data, allowed(place));
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
  __device__ __forceinline__ static void mask(float (&numbers)[4], unsigned stays) {
#pragma unroll
    for (int e = 0; e < 4; ++e) numbers[e] = stays >> e & 1 ? numbers[e] : minus_infinity();
  }
};

// How a row with penalties is loaded.
template <class Config, class Params>
struct PenaltyStage {
  static constexpr bool kChanges = true;
  PenaltyPatch<Config, Params>& patch;
  int output;
  int64 slot;

  __device__ __forceinline__ void begun() { patch.prepare(output, slot); }
};

}  // namespace fi
