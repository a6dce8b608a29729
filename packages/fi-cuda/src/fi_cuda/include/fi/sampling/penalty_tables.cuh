// What the penalties of a part of a row need, copied into shared memory with the row.
//
// Params: those of penalties.cuh.
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

// The tables of a block's part of a row, the tokens from `first_token` (a multiple of 32) on, for an output in place `slot` of the
// columns. Each is copied by one warp, so that no warp computes the addresses of all, and none waits.
template <class Config, class Params>
struct PenaltyTables {
  static constexpr int kThreads = Config::kNumThreads, kTokens = RowShape<Config>::kBlockTokens, kWords = kTokens / 32;
  static constexpr bool kRowIsCopied = sizeof(typename Config::Dtype) == 4 && Config::kVectorBytes == 16;
  using Shared = PenaltyShared<kTokens>;
  enum Turn { kFilters, kBias, kSeen, kEntries, kAllowed, kStepAllowed, kColumns };

  const Params& params;
  Shared& shared;
  int first_token, num_tokens;
  int place, history = 0;
  int64 asked_slot = 0;

  __device__ __forceinline__ PenaltyTables(const Params& params, Shared& shared, int first_token)
      : params(params),
        shared(shared),
        first_token(first_token),
        num_tokens(max(0, min(params.vocab_size - first_token, kTokens))) {}

  // Whether this warp does it.
  __device__ __forceinline__ static bool is_turn(Turn turn) { return static_cast<int>(threadIdx.x / 32) == turn % (kThreads / 32); }
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x % 32); }

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

  // Then, by all threads, all else; it is there when the threads' copies are and all have met.
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
    } else if (aligned && count % kEach == 0) {  // else a copy would cover words behind the table
#pragma unroll 1
      for (int mine = lane() * kEach; mine < kCount; mine += 32 * kEach) {
        ptx::cp_async_part<4 * kEach>(there + mine, here + mine, mine < count ? 4 * kEach : 0);
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
};

}  // namespace fi
