// fi_core.PenaltyParams applied to a part of a row in shared memory: the sparse parts as patches of single tokens by the block that
// holds them, then the bitmasks in the pass that finds the row's extremes.
//
// Config: kDense: counts of tokens are dense and none of this header's concern.
// Params: allowed, step_allowed (int32 masks, rows of allowed_stride and step_allowed_stride words); bias_indptr, bias_tokens,
// bias_values, bias_until; repetition, frequency, presence; history_rows; of the histories seen (seen_stride words a row),
// entries (pairs of token and count, entry_stride words a row, capacity pairs), num_entries, num_output. Null: not used.
#pragma once

#include "fi/sampling/penalty_tables.cuh"

namespace fi {

// Applies the tables to the part of the row in `slice`.
template <class Config, class Params>
struct PenaltyPatch : PenaltyTables<Config, Params> {
  using Tables = PenaltyTables<Config, Params>;
  using typename Tables::Shared;
  using Columns = typename Shared::Columns;
  using Tables::entries_of, Tables::first_token, Tables::history, Tables::kThreads, Tables::kWords, Tables::lane, Tables::num_tokens,
      Tables::params, Tables::place, Tables::shared;
  // Until counts are subtracted, a warp's part of the slice is its own if it begins and ends with whole words of bits: no barrier, so
  // that warps need not wait for one another. Else all threads share the slice.
  static constexpr bool kOwn = RowShape<Config>::kWarpTokens % 32 == 0;
  static constexpr int kTogether = kOwn ? 32 : kThreads;
  static constexpr int kPartWords = kOwn ? RowShape<Config>::kWarpTokens / 32 : kWords;
  static constexpr int kWordsEach = (kPartWords + kTogether - 1) / kTogether;

  float* slice;

  __device__ __forceinline__ PenaltyPatch(const Params& params, Shared& shared, float* slice, int first_token)
      : Tables(params, shared, first_token), slice(slice) {}

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

  __device__ __forceinline__ void begun() { patch.ask(output); }
};

}  // namespace fi
