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

// What a block keeps in shared memory of a row's columns and lists, and bits of its `kTokens` tokens, of words in the vocabulary.
template <int kTokens>
struct PenaltyShared {
  static_assert(kTokens % 32 == 0);
  static constexpr int kWords = (kTokens / 32 + 3) / 4 * 4;
  static constexpr int kEntries = 512, kBiases = 32;  // the first of a list

  struct Columns {
    float repetition, frequency, presence;
    int num_entries;  // of the history
    int bias_begin, bias_end;
    int num_output;
    int unused;
  };
  alignas(16) Columns columns;
  alignas(16) int bias_tokens[kBiases];
  float bias_values[kBiases];
  int bias_until[kBiases];  // of how many tokens of output on a bias is not -inf
  alignas(16) unsigned allowed[kWords];       // the tokens that stay
  alignas(16) unsigned step_allowed[kWords];  // by another mask too
  alignas(16) unsigned seen[kWords];
  alignas(16) int2 entries[kEntries];
};

// A block's part of a row, the tokens from `first_token` (a multiple of 32) on, for an output in place `slot` of the columns. What
// the patches need is copied with the row, each table by one warp, so that no warp computes the addresses of all, and none waits.
template <class Config, class Params>
struct PenaltyPatch {
  static constexpr int kThreads = Config::kNumThreads, kTokens = RowShape<Config>::kBlockTokens, kWords = kTokens / 32;
  // Until counts are subtracted, a warp's part of the slice is its own if it begins and ends with whole words of bits: no barrier, so
  // that warps need not wait for one another. Else all threads share the slice.
  static constexpr bool kOwn = RowShape<Config>::kWarpTokens % 32 == 0;
  static constexpr int kTogether = kOwn ? 32 : kThreads;
  static constexpr int kPartWords = kOwn ? RowShape<Config>::kWarpTokens / 32 : kWords;
  static constexpr int kWordsEach = (kPartWords + kTogether - 1) / kTogether;
  static constexpr bool kRowIsCopied = sizeof(typename Config::Dtype) == 4 && Config::kVectorBytes == 16;
  using Shared = PenaltyShared<kTokens>;
  using Columns = typename Shared::Columns;
  enum Turn { kFilters, kBias, kSeen, kEntries, kAllowed, kStepAllowed, kColumns };

  const Params& params;
  Shared& shared;
  float* slice;
  int first_token, num_tokens;
  int place, history = 0;
  int64 asked_slot = 0;

  __device__ __forceinline__ PenaltyPatch(const Params& params, Shared& shared, float* slice, int first_token)
      : params(params),
        shared(shared),
        slice(slice),
        first_token(first_token),
        num_tokens(max(0, min(params.vocab_size - first_token, kTokens))) {}

  // Whether this warp does it.
  __device__ __forceinline__ static bool is_turn(Turn turn) { return static_cast<int>(threadIdx.x / 32) == turn % (kThreads / 32); }
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x % 32); }

  // Of the part that this thread shares: which of its threads this is, its first word, and where it ends in the vocabulary.
  __device__ __forceinline__ static int thread_of_part() { return kOwn ? lane() : static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ static int first_word() { return kOwn ? static_cast<int>(threadIdx.x / 32) * kPartWords : 0; }
  __device__ __forceinline__ int part_tokens() const { return max(0, min(num_tokens - first_word() * 32, kPartWords * 32)); }
  __device__ __forceinline__ static void meet_in_part() {
    if constexpr (kOwn) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // By all threads, before the row is asked for, whose bytes other answers come behind: where its biases lie.
  __device__ __forceinline__ void locate(int output, int64 slot) {
    asked_slot = slot;
    if (params.history_rows != nullptr) history = static_cast<const int*>(params.history_rows)[output];
    if (is_turn(kBias)) {
      copy_column(&shared.columns.bias_begin, params.bias_indptr, place_of(slot), 0, 0);
      copy_column(&shared.columns.bias_end, params.bias_indptr, place_of(slot) + 1, 1, 0);
      ptx::cp_async_commit();
    }
  }
  __device__ __forceinline__ static int place_of(int64 slot) { return slot < 0 ? 0 : static_cast<int>(slot); }

  // Then, by all threads, all else; it is there after apply's first barrier.
  __device__ __forceinline__ void ask(int output) {
    asm volatile("" : "+l"(asked_slot));  // no use of it, and so no wait, before here
    place = place_of(asked_slot);
    if (params.history_rows == nullptr) history = place;
    copy_bits(output);
    if (is_turn(kEntries) && has_history()) {
      copy_words<2 * Shared::kEntries>(shared.entries, entries_of(history), 2 * min(params.capacity, Shared::kEntries));
    }
    if (is_turn(kColumns)) {
      const bool used = has_history();
      copy_column(&shared.columns.repetition, used ? params.repetition : nullptr, place, 0, 1.0f);
      copy_column(&shared.columns.frequency, used ? params.frequency : nullptr, place, 1, 0.0f);
      copy_column(&shared.columns.presence, used ? params.presence : nullptr, place, 2, 0.0f);
      copy_column(&shared.columns.num_entries, used ? params.num_entries : nullptr, history, 3, 0);
      copy_column(&shared.columns.num_output, params.bias_until != nullptr ? params.num_output : nullptr, history, 4, 0);
    }
    if (is_turn(kBias)) copy_biases();
    ptx::cp_async_commit();
  }

  // The first biases, when it is known where they lie.
  __device__ __forceinline__ void copy_biases() const {
    ptx::cp_async_wait<kRowIsCopied ? 1 : 0>();
    __syncwarp();
    const int mine = shared.columns.bias_begin + lane();
    if (mine >= shared.columns.bias_end) return;
    const auto copy = [&](void* to, const void* from) { ptx::cp_async_part<4>(to, static_cast<const int*>(from) + mine, 4); };
    copy(&shared.bias_tokens[lane()], params.bias_tokens);
    copy(&shared.bias_values[lane()], params.bias_values);
    if (params.bias_until != nullptr) copy(&shared.bias_until[lane()], params.bias_until);
  }

  // One element of a column of 4-byte ones, by lane `by`; `none` where there is no column.
  template <class T>
  __device__ __forceinline__ static void copy_column(T* to, const void* column, int at, int by, T none) {
    if (lane() != by) return;
    if (column != nullptr) {
      ptx::cp_async_part<4>(to, static_cast<const T*>(column) + at, 4);
    } else {
      *to = none;
    }
  }

  // This part's words of the tables of bits, zeros behind the vocabulary; a single mask lies in shared.allowed.
  __device__ __forceinline__ void copy_bits(int output) const {
    static_assert(kThreads >= 128, "each table has its warp");
    const void* table = nullptr;
    unsigned* to = shared.allowed;
    int row = place;
    int64 stride = params.allowed_stride;
    if (is_turn(kAllowed)) {
      table = params.allowed;
    } else if (is_turn(kStepAllowed)) {
      table = params.step_allowed;
      row = output;
      stride = params.step_allowed_stride;
      if (params.allowed != nullptr) to = shared.step_allowed;
    } else if (is_turn(kSeen)) {
      if (has_history() && params.repetition != nullptr) table = params.seen;
      row = history;
      stride = params.seen_stride;
      to = shared.seen;
    }
    if (table != nullptr) {
      const unsigned* from = static_cast<const unsigned*>(table) + row * stride + static_cast<unsigned>(first_token) / 32;
      copy_words<kWords>(to, from, (num_tokens + 31) / 32);
    } else if (is_turn(kAllowed) && params.step_allowed == nullptr) {
#pragma unroll 1
      for (int word = lane(); word < kWords; word += 32) shared.allowed[word] = 0xffffffffu;
    }
  }

  // The first `count` of kCount words and zeros behind them, by a warp.
  template <int kCount>
  __device__ __forceinline__ static void copy_words(void* to, const void* from, int count) {
    constexpr int kEach = kCount % 4 == 0 ? 4 : kCount % 2 == 0 ? 2 : 1;
    unsigned* there = static_cast<unsigned*>(to);
    const unsigned* here = static_cast<const unsigned*>(from);
    const bool aligned = reinterpret_cast<unsigned long long>(from) % (4 * kEach) == 0;
    if (aligned && count == kCount) {
#pragma unroll
      for (int word = 0; word < kCount; word += 32 * kEach) {
        const int mine = word + lane() * kEach;
        if (word + 32 * kEach <= kCount || mine < kCount) ptx::cp_async_part<4 * kEach>(there + mine, here + mine, 4 * kEach);
      }
    } else if (aligned) {
#pragma unroll 1
      for (int mine = lane() * kEach; mine < kCount; mine += 32 * kEach) {
        ptx::cp_async_part<4 * kEach>(there + mine, here + mine, 4 * max(0, min(count - mine, kEach)));
      }
    } else {
#pragma unroll 1
      for (int mine = lane(); mine < kCount; mine += 32) ptx::cp_async_part<4>(there + mine, here + mine, mine < count ? 4 : 0);
    }
  }

  __device__ __forceinline__ const int2* entries_of(int history) const {
    return reinterpret_cast<const int2*>(static_cast<const int*>(params.entries) + history * params.entry_stride);
  }

  __device__ __forceinline__ bool has_history() const { return !Config::kDense && params.seen != nullptr; }

  // Bits of the 32 from place / 32 * 32 on, that of `place` lowest. After apply.
  __device__ __forceinline__ unsigned allowed(int place) const {
    return shared.allowed[static_cast<unsigned>(place) / 32] >> (place & 31);
  }

  // Calls patch(place) if `token` is one of the `count` tokens from place `first` on.
  template <class Patch>
  __device__ __forceinline__ void if_inside(int token, int first, int count, Patch patch) const {
    // Unsigned, so that tokens before them, and -1, are beyond them.
    const unsigned at = static_cast<unsigned>(token) - static_cast<unsigned>(first_token + first);
    if (at < static_cast<unsigned>(count)) patch(first + static_cast<int>(at));
  }

  // All parts but the bitmasks, each value rounded after each step, as the reference does. By all threads, which meet here, after ask and
  // the row's arrival. False if the history lacks what is to be counted: the row cannot be drawn from.
  __device__ __forceinline__ bool apply() {
    ptx::cp_async_wait<0>();
    __syncthreads();
    const Columns columns = shared.columns;
    const bool two_masks = params.allowed != nullptr && params.step_allowed != nullptr;
    const int num_entries = columns.frequency != 0.0f || columns.presence != 0.0f ? columns.num_entries : 0;
    if (two_masks) {
#pragma unroll
      for (int word = thread_of_part(); word < kPartWords; word += kTogether) {
        shared.allowed[first_word() + word] &= shared.step_allowed[first_word() + word];
      }
    }
    if (columns.bias_begin < columns.bias_end) {
      add_bias(columns);
      meet_in_part();
    }
    if (columns.repetition != 1.0f) repeat(columns.repetition);
    __syncthreads();
    if (num_entries > params.capacity) return false;
    if (num_entries > 0) {
      subtract_counts(num_entries, columns.frequency, columns.presence);
      __syncthreads();
    }
    return true;
  }

  __device__ __forceinline__ void add_bias(const Columns& columns) const {
    const int first = first_word() * 32, inside = part_tokens();
    const auto add = [&](int token, float amount, int until) {
      const float bias = columns.num_output < until ? minus_infinity() : amount;
      if_inside(token, first, inside, [&](int at) { slice[at] = __fadd_rn(slice[at], bias); });
    };
    const bool bounded = params.bias_until != nullptr;
    const int mine = thread_of_part(), count = columns.bias_end - columns.bias_begin;
    if (mine < min(count, Shared::kBiases)) add(shared.bias_tokens[mine], shared.bias_values[mine], bounded ? shared.bias_until[mine] : 0);
    const int* tokens = static_cast<const int*>(params.bias_tokens) + columns.bias_begin;
    const float* values = static_cast<const float*>(params.bias_values) + columns.bias_begin;
    const int* until = static_cast<const int*>(params.bias_until) + columns.bias_begin;
#pragma unroll 1
    for (int entry = mine + Shared::kBiases; entry < count; entry += kTogether) add(tokens[entry], values[entry], bounded ? until[entry] : 0);
  }

  // The seen tokens, of which each thread has those of its words, kTogether words apart. What lies past the vocabulary is NaN and stays so.
  __device__ __forceinline__ void repeat(float repetition) {
    const Divisor divisor(repetition);
    // Of positive floats' bits: those whose quotients Divisor has.
    constexpr unsigned kLeast = 0x219392f0u;  // above 1e-18
    unsigned served = divisor.moderate ? 0x5d5e0b6bu - kLeast : 0;  // up to 1e18
    asm volatile("" : "+r"(served));  // computed once, not for each token
    float* from = slice + (first_word() + thread_of_part()) * 32;
    unsigned seen[kWordsEach];
#pragma unroll
    for (int idx = 0; idx < kWordsEach; ++idx) {
      const int word = thread_of_part() + idx * kTogether;
      seen[idx] = word < kPartWords ? shared.seen[first_word() + word] : 0;
    }
    // All words in one loop, so that a warp's lanes wait for one another once.
#pragma unroll 1
    for (;;) {
      const bool next = kWordsEach > 1 && seen[0] == 0;
      unsigned left = 0;
#pragma unroll
      for (int idx = 0; idx < kWordsEach; ++idx) {
        if (next) seen[idx] = idx + 1 < kWordsEach ? seen[idx + 1] : 0;
        left |= seen[idx];
      }
      from += next ? kTogether * 32 : 0;
      if (left == 0) break;
      if (kWordsEach > 2 && seen[0] == 0) continue;
      const int last = 31 - __clz(static_cast<int>(seen[0]));
      seen[0] ^= 1u << last;
      const float number = from[last];
      const bool positive = number > 0.0f;
      float value = positive ? divisor.quotient(number) : __fmul_rn(number, repetition);
      if (positive && __float_as_uint(number) - kLeast >= served) value = __fdiv_rn(number, repetition);
      from[last] = value;
    }
  }

  // The first entries have come with the row.
  __device__ __forceinline__ void subtract_counts(int num_entries, float frequency, float presence) const {
    const auto subtract = [&](int2 entry) {
      if_inside(entry.x, 0, num_tokens, [&](int at) {
        slice[at] = __fsub_rn(__fsub_rn(slice[at], __fmul_rn(frequency, static_cast<float>(entry.y))), presence);
      });
    };
    int entry = static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (; entry < min(num_entries, Shared::kEntries); entry += kThreads) subtract(shared.entries[entry]);
#pragma unroll 1
    for (; entry < num_entries; entry += kThreads) subtract(entries_of(history)[entry]);
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

  // Without bounds, a mask's word beside each four tokens; of a few rounds all is read before any is written.
  template <bool kDivided>
  __device__ __forceinline__ void settle_full_rounds(Extremes& found, const Divisor& divisor) const {
    constexpr int kBatch = kDivided ? 1 : 4, kRounds = RowShape<Config>::kFullRounds, kWhole = kRounds / kBatch * kBatch;
    const int first = place_of_full_round<Config>(0);
#pragma unroll 1
    for (int round = 0; round < kWhole; round += kBatch) settle_rounds<kDivided, kBatch>(found, divisor, first + round * 128);
    if constexpr (kRounds > kWhole) settle_rounds<kDivided, kRounds - kWhole>(found, divisor, first + kWhole * 128);
  }

  template <bool kDivided, int kCount>
  __device__ __forceinline__ void settle_rounds(Extremes& found, const Divisor& divisor, int first) const {
    float* place = slice + first;
    const unsigned* words = shared.allowed + static_cast<unsigned>(first) / 32;
    const unsigned turn = (first - 1) & 31;  // which leaves the four tokens' bits in places 1 to 4, where one instruction tests all
    float4 fours[kCount];
    unsigned bits[kCount];
#pragma unroll
    for (int round = 0; round < kCount; ++round) {
      fours[round] = *reinterpret_cast<const float4*>(place + round * 128);
      bits[round] = words[round * 4];
    }
#pragma unroll
    for (int round = 0; round < kCount; ++round) {
      Pack<float, 16> part = {{fours[round].x, fours[round].y, fours[round].z, fours[round].w}};
      round_off(part.data);
      if (kDivided) divisor.divide(part.data);
      mask<1>(part.data, __funnelshift_r(bits[round], bits[round], turn));
      found.template take_four<Config>(part.data);
      store_pack(place + round * 128, part);
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

  __device__ __forceinline__ void begun() { patch.ask(output); }
};

}  // namespace fi
