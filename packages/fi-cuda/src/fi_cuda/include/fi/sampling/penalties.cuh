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

// What a block keeps of a row's columns in shared memory: scalars, and bits of its `kTokens` tokens.
template <int kTokens>
struct PenaltyShared {
  static_assert(kTokens % 32 == 0);
  struct alignas(16) Scalars {
    int place, history;  // rows of the columns
    int bias_begin, bias_end;
    int num_entries;  // of the history, 0 if they change nothing
    float repetition, frequency, presence;
  };
  Scalars scalars;
  unsigned allowed[kTokens / 32];  // those that stay; of words in the vocabulary
};

// A block's part of a row, the tokens from `first_token` (a multiple of 32) on, for an output in place `slot` of the columns. What
// the patches need comes with the row: masks into shared memory, all else that is this thread's into registers.
template <class Config, class Params>
struct PenaltyPatch {
  static constexpr int kThreads = Config::kNumThreads, kTokens = RowShape<Config>::kBlockTokens, kWords = kTokens / 32;
  static constexpr int kWordsEach = (kWords + kThreads - 1) / kThreads;
  static constexpr int kEntriesEach = kThreads < 512 ? 512 / kThreads : 1;

  const Params& params;
  PenaltyShared<kTokens>& shared;
  float* slice;
  int first_token, num_tokens;
  int biased = -1;  // the token of this thread's first bias, and what is added
  float bias = 0.0f;
  int2 counted[kEntriesEach];  // this thread's first entries of the history
  unsigned seen[kWordsEach];   // bits of the tokens of prompt and output, 32 from threadIdx.x * 32 on, 32 from kThreads * 32 further on

  __device__ __forceinline__ PenaltyPatch(const Params& params, PenaltyShared<kTokens>& shared, float* slice, int first_token)
      : params(params),
        shared(shared),
        slice(slice),
        first_token(first_token),
        num_tokens(max(0, min(params.vocab_size - first_token, kTokens))) {}

  // By all threads; what it stores in shared memory is there after the next barrier.
  __device__ __forceinline__ void prepare(int output, int64 slot) {
    const unsigned thread = threadIdx.x;
    const int place = slot < 0 ? 0 : static_cast<int>(slot);
    const int history = params.history_rows == nullptr ? place : static_cast<const int*>(params.history_rows)[output];
    const int* indptr = static_cast<const int*>(params.bias_indptr);
    const int begin = indptr == nullptr ? 0 : indptr[place], end = indptr == nullptr ? 0 : indptr[place + 1];
    unsigned allowed[kWordsEach];
#pragma unroll
    for (int idx = 0; idx < kWordsEach; ++idx) {
      allowed[idx] = 0xffffffffu;
      seen[idx] = 0;
    }
    if (params.allowed != nullptr) {
      const unsigned* words = words_of(params.allowed, place, params.allowed_stride);
      for_each_word([&](int idx) { allowed[idx] = __ldg(words + thread + idx * kThreads); });
    }
    if (has_history() && params.repetition != nullptr) {
      const unsigned* words = words_of(params.seen, history, params.seen_stride);
      for_each_word([&](int idx) { seen[idx] = words[thread + idx * kThreads]; });
    }
    if (has_history()) {
      const int2* entries = entries_of(history);
#pragma unroll
      for (int idx = 0; idx < kEntriesEach; ++idx) {
        const int entry = static_cast<int>(thread) + idx * kThreads;
        counted[idx] = entry < params.capacity ? entries[entry] : make_int2(-1, 0);
      }
    }
    if (params.step_allowed != nullptr) {
      const unsigned* words = words_of(params.step_allowed, output, params.step_allowed_stride);
      for_each_word([&](int idx) { allowed[idx] &= __ldg(words + thread + idx * kThreads); });
    }
    if (thread == kThreads - 1) {  // the first has the row's other parameters to load
      typename PenaltyShared<kTokens>::Scalars scalars = {place, history, begin, end, 0, 1.0f, 0.0f, 0.0f};
      if (has_history()) {
        const int num_entries = static_cast<const int*>(params.num_entries)[history];
        scalars.repetition = value_of(params.repetition, place, 1.0f);
        scalars.frequency = value_of(params.frequency, place, 0.0f);
        scalars.presence = value_of(params.presence, place, 0.0f);
        if (scalars.frequency != 0.0f || scalars.presence != 0.0f) scalars.num_entries = num_entries;
      }
      shared.scalars = scalars;
    }
    const int mine = begin + static_cast<int>(thread);
    if (mine < end) {
      biased = static_cast<const int*>(params.bias_tokens)[mine];
      bias = bias_at(history, mine);
    }
    for_each_word([&](int idx) { shared.allowed[thread + idx * kThreads] = allowed[idx]; });
  }

  // Calls visit(idx) for those of this thread's words of bits in which the vocabulary has tokens.
  template <class Visit>
  __device__ __forceinline__ void for_each_word(Visit visit) const {
#pragma unroll
    for (int idx = 0; idx < kWordsEach; ++idx) {
      if (static_cast<int>(threadIdx.x + idx * kThreads) * 32 < num_tokens) visit(idx);
    }
  }
  // Where row `row` of a table of bits has those of this part.
  __device__ __forceinline__ const unsigned* words_of(const void* table, int row, int64 stride) const {
    return static_cast<const unsigned*>(table) + row * stride + static_cast<unsigned>(first_token) / 32;
  }
  __device__ __forceinline__ const int2* entries_of(int history) const {
    return reinterpret_cast<const int2*>(static_cast<const int*>(params.entries) + history * params.entry_stride);
  }

  __device__ __forceinline__ bool has_history() const { return !Config::kDense && params.seen != nullptr; }
  __device__ __forceinline__ float value_of(const void* column, int place, float none) const {
    return column == nullptr ? none : static_cast<const float*>(column)[place];
  }
  __device__ __forceinline__ float bias_at(int history, int entry) const {
    const float value = static_cast<const float*>(params.bias_values)[entry];
    const int* until = static_cast<const int*>(params.bias_until);
    const bool early = until != nullptr && static_cast<const int*>(params.num_output)[history] < until[entry];
    return early ? minus_infinity() : value;
  }

  // Bits of the 32 from place / 32 * 32 on, that of `place` lowest. After prepare and a barrier.
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

  // Whether all that is to be counted is in the history: if not, the row cannot be drawn from. After prepare and a barrier.
  __device__ __forceinline__ bool fits() const { return shared.scalars.num_entries <= params.capacity; }

  // All parts but the bitmasks, each value rounded after each step, as the reference does. By all threads, which meet here, after
  // prepare and the row's arrival. Returns fits().
  __device__ __forceinline__ bool apply() {
    __syncthreads();
    const auto scalars = shared.scalars;
    if (scalars.bias_begin < scalars.bias_end) {
      add_bias(scalars.bias_begin, scalars.bias_end, scalars.history);
      __syncthreads();
    }
    if (scalars.repetition != 1.0f) {
      repeat(scalars.repetition);
      __syncthreads();
    }
    const bool fit = scalars.num_entries <= params.capacity;
    if (fit && scalars.num_entries > 0) {
      subtract_counts(scalars.num_entries, scalars.history, scalars.frequency, scalars.presence);
      __syncthreads();
    }
    return fit;
  }

  __device__ __forceinline__ void add_bias(int begin, int end, int history) const {
    const auto add = [&](int token, float amount) {
      if_inside(token, [&](int at) { slice[at] = __fadd_rn(slice[at], amount); });
    };
    add(biased, bias);
#pragma unroll 1
    for (int entry = begin + static_cast<int>(threadIdx.x) + kThreads; entry < end; entry += kThreads) {
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
  __device__ __forceinline__ void subtract_counts(int num_entries, int history, float frequency, float presence) const {
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
    Extremes found = {minus_infinity(), -minus_infinity()};
    if (temperature == 1.0f) {
      settle<false>(found, Divisor(1.0f));
    } else {
      settle<true>(found, Divisor(temperature));
    }
    return found;
  }

  template <bool kDivided>
  __device__ __forceinline__ void settle(Extremes& found, const Divisor& divisor) const {
    using Shape = RowShape<Config>;
    const bool whole = static_cast<int>(threadIdx.x / 32 + 1) * Shape::kWarpTokens <= num_tokens;
    if (!whole || Shape::kFullRounds == 0) {
      for_each_four<Config, 1>(slice, [&](int place, float4 four) { settle_four<kDivided>(found, divisor, place, four); });
      return;
    }
    settle_full_rounds<kDivided>(found, divisor);
    if (Shape::kRounds > Shape::kFullRounds) {
      const int place = place_of_partial_round<Config>();
      settle_four<kDivided>(found, divisor, place, four_behind<Config>(slice, place));
    }
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

  template <bool kDivided>
  __device__ __forceinline__ void settle_four(Extremes& found, const Divisor& divisor, int place, float4 four) const {
    const int left = num_tokens - place;  // of the vocabulary; what lies behind it stays as it is
    if (left <= 0) return;
    Pack<float, 16> part = {{four.x, four.y, four.z, four.w}};
    round_off(part.data);
    if (kDivided) divisor.divide(part.data);
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

  __device__ __forceinline__ void begun() { patch.prepare(output, slot); }
};

}  // namespace fi
