// A row of logits held by a cluster: each block keeps a slice of consecutive tokens in its shared memory as scaled float32,
// each warp a part of the slice. Places past the vocabulary hold NaN, which no comparison takes, or -inf; neither has mass.
#pragma once

#include "fi/ptx/cp_async.cuh"
#include "fi/ptx/math.cuh"
#include "fi/tile/pack.cuh"
#include "fi/tile/reduce.cuh"

namespace fi {

template <class Config>
struct RowShape {
  static constexpr int kWarps = Config::kNumThreads / 32;
  static constexpr int kWarpTokens = Config::kWarpTokens;
  static constexpr int kBlockTokens = kWarps * kWarpTokens;
  static constexpr int kRounds = (kWarpTokens + 127) / 128, kFullRounds = kWarpTokens / 128;
  static constexpr int kSliceFloats = kBlockTokens + 4;
};

constexpr int kNoPlace = 0x3fffffff;

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

// Whether a slice may hold NaN where its row has none.
template <class Config>
constexpr bool kHasNan = !Config::kWeighed;

// Past the vocabulary.
template <class Config>
__device__ __forceinline__ float no_logit() {
  return kHasNan<Config> ? not_a_number() : minus_infinity();
}

// The place, a multiple of 4, of this thread's part of the slice whose turn is round `round`, one of all lanes.
template <class Config>
__device__ __forceinline__ int place_of_full_round(int round) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  return warp * RowShape<Config>::kWarpTokens + (round * 32 + lane) * 4;
}

// The same of the last round, of some lanes; kNoPlace for the others.
template <class Config>
__device__ __forceinline__ int place_of_partial_round() {
  using Shape = RowShape<Config>;
  const bool has = Shape::kFullRounds * 128 + static_cast<int>(threadIdx.x % 32) * 4 < Shape::kWarpTokens;
  return has ? place_of_full_round<Config>(Shape::kFullRounds) : kNoPlace;
}

// The same of any round.
template <class Config>
__device__ __forceinline__ int place_of_round(int round) {
  return round < RowShape<Config>::kFullRounds ? place_of_full_round<Config>(round) : place_of_partial_round<Config>();
}

// The four logits there; at kNoPlace those behind the slice, no_logit each.
template <class Config>
__device__ __forceinline__ float4 four_behind(const float* slice, int place) {
  return *reinterpret_cast<const float4*>(slice + (place == kNoPlace ? RowShape<Config>::kBlockTokens : place));
}

// Before the first of four_behind, and a barrier.
template <class Config>
__device__ __forceinline__ void end_slice(float* slice) {
  if (RowShape<Config>::kWarpTokens % 128 != 0 && threadIdx.x < 4) slice[RowShape<Config>::kBlockTokens + threadIdx.x] = no_logit<Config>();
}

// Calls visit(place, four logits as float4) for each place of this thread's part of the slice. All lanes of a warp call it
// together, with kNoPlace too. The code of visit is there kUnroll times, and once more for a last round of some lanes; with 1 once.
template <class Config, int kUnroll = 2, class Visit>
__device__ __forceinline__ void for_each_four(const float* slice, Visit visit) {
  using Shape = RowShape<Config>;
  if constexpr (kUnroll == 1) {
#pragma unroll 1
    for (int round = 0; round < Shape::kRounds; ++round) {
      const int place = place_of_round<Config>(round);
      visit(place, four_behind<Config>(slice, place));
    }
    return;
  }
#pragma unroll kUnroll
  for (int round = 0; round < Shape::kFullRounds; ++round) {
    const int place = place_of_full_round<Config>(round);
    visit(place, *reinterpret_cast<const float4*>(slice + place));
  }
  if (Shape::kRounds > Shape::kFullRounds) {
    const int place = place_of_partial_round<Config>();
    visit(place, four_behind<Config>(slice, place));
  }
}

struct Extremes {
  float largest, smallest;  // largest: NaN if any logit is; smallest only if Config::kSmallest

  template <class Config>
  __device__ __forceinline__ void take(float logit) {
    largest = ptx::max_or_nan(largest, logit);
    if (Config::kSmallest) smallest = fminf(smallest, logit);
  }

  // Pairs first: one of its instructions waits for the fours before, not four.
  template <class Config>
  __device__ __forceinline__ void take_four(const float (&logits)[4]) {
    largest = ptx::max_or_nan(largest, ptx::max_or_nan(ptx::max_or_nan(logits[0], logits[1]), ptx::max_or_nan(logits[2], logits[3])));
    if (Config::kSmallest) smallest = fminf(smallest, fminf(fminf(logits[0], logits[1]), fminf(logits[2], logits[3])));
  }
};

template <class T, int kBytes>
__device__ __forceinline__ Pack<T, kBytes> load_once(const T* address) {
  if constexpr (kBytes == 16) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(address));
    return *reinterpret_cast<const Pack<T, kBytes>*>(&bits);
  } else {
    return load_pack<kBytes>(address);
  }
}

// What happens to a row on its way into the slice: nothing. A stage's `begun` is called by all threads when the first loads are
// under way, so that what it loads comes with them. One that kChanges the row does so afterwards, and takes the extremes then.
struct PlainStage {
  static constexpr bool kChanges = false;
  __device__ __forceinline__ void begun() {}
};

// load_slice of elements that need no conversion. All of a thread's copies are under way at once and take no registers; each
// thread then reads what it copied itself, so no barrier is needed.
template <class Config, class Stage>
__device__ __forceinline__ Extremes copy_slice(const float* row, int first_token, int vocab_size, float* slice, Stage& stage) {
  using Shape = RowShape<Config>;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int first = warp * Shape::kWarpTokens + lane * 4, room = Shape::kWarpTokens - lane * 4;
  const float* from = row + first_token + first;
  float* to = slice + first;
  const int left = min(vocab_size - first_token - first, room);  // a pack lies in the vocabulary whole or not at all
  if (left == room) {
    // Addresses are constants beside these two.
#pragma unroll
    for (int offset = 0; offset < Shape::kWarpTokens; offset += 128) {
      if (offset + 128 <= Shape::kWarpTokens || offset < room) ptx::cp_async_16(to + offset, from + offset, true);
    }
  } else {
#pragma unroll 1
    for (int offset = 0; offset < left; offset += 128) ptx::cp_async_16(to + offset, from + offset, true);
  }
  ptx::cp_async_commit();
  stage.begun();
#pragma unroll 1
  for (int offset = max(left + 127, 0) / 128 * 128; offset < room; offset += 128) {
    const float none = no_logit<Config>();
    *reinterpret_cast<float4*>(to + offset) = make_float4(none, none, none, none);
  }
  ptx::cp_async_wait<0>();
  Extremes found = {minus_infinity(), -minus_infinity()};
  if constexpr (!Stage::kChanges) {
#pragma unroll 4
    for (int offset = 0; offset < left; offset += 128) {
      const float4 four = *reinterpret_cast<const float4*>(to + offset);
      const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) found.template take<Config>(logits[e]);
    }
  }
  return found;
}

// Reads this thread's part of the slice that begins at `first_token`. Returns the thread's extremes, unless the stage changes them.
template <class Config, class Stage>
__device__ __forceinline__ Extremes load_slice(const typename Config::Dtype* row, int first_token, int vocab_size,
                                               float* slice, Stage& stage) {
  using T = typename Config::Dtype;
  using Shape = RowShape<Config>;
  if constexpr (sizeof(T) == 4 && Config::kVectorBytes == 16) {
    return copy_slice<Config>(row, first_token, vocab_size, slice, stage);
  }
  constexpr int kCount = Config::kVectorBytes / static_cast<int>(sizeof(T));
  constexpr int kPerRound = 32 * kCount;
  constexpr int kRounds = (Shape::kWarpTokens + kPerRound - 1) / kPerRound;
  // Beside other blocks less in flight is enough, and leaves registers.
  constexpr int kNarrow = Config::kResidentBlocks == 2 ? 2 : 1;  // packs of more tokens
  constexpr int kMost = Config::kResidentBlocks == 1 ? 8 : Stage::kChanges && sizeof(T) < 4 ? kNarrow : 4;
  constexpr int kBatch = kRounds < kMost ? kRounds : kMost;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  Extremes found = {minus_infinity(), -minus_infinity()};
  for (int first_round = 0; first_round < kRounds; first_round += kBatch) {
    Pack<T, Config::kVectorBytes> held[kBatch];
#pragma unroll
    for (int idx = 0; idx < kBatch; ++idx) {
      const int offset = (first_round + idx) * kPerRound + lane * kCount;
      const int token = first_token + warp * Shape::kWarpTokens + offset;
      if (offset < Shape::kWarpTokens && token < vocab_size) held[idx] = load_once<T, Config::kVectorBytes>(row + token);
    }
    if (first_round == 0) stage.begun();
#pragma unroll
    for (int idx = 0; idx < kBatch; ++idx) {
      const int offset = (first_round + idx) * kPerRound + lane * kCount;
      const int place = warp * Shape::kWarpTokens + offset;
      if (offset < Shape::kWarpTokens) {
        const bool inside = first_token + place < vocab_size;
        Pack<float, (kCount < 4 ? kCount : 4) * 4> part;
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          float logit = no_logit<Config>();
          if (inside) {
            logit = to_float(held[idx].data[e]);
            if (!Stage::kChanges) found.template take<Config>(logit);
          }
          part.data[e % 4] = logit;
          if (e % 4 == 3 || e == kCount - 1) store_pack(slice + place + e / 4 * 4, part);
        }
      }
    }
  }
  return found;
}

template <class Config>
__device__ __forceinline__ Extremes load_slice(const typename Config::Dtype* row, int first_token, int vocab_size,
                                               float* slice) {
  PlainStage stage;
  return load_slice<Config>(row, first_token, vocab_size, slice, stage);
}

// Quotients by a divisor, as a division rounds them. The product with its reciprocal and what that lacks is within half a unit in
// the last place and a millionth of one; then the remainder is exact, and the sum with its quotient rounds rightly (Markstein,
// "Computation of elementary functions on the IBM RISC System/6000 processor", 1990, section 5). Numbers whose remainders might be
// subnormal or overflow are divided one by one.
struct Divisor {
  float value, reciprocal, rest;
  bool moderate;

  __device__ __forceinline__ explicit Divisor(float value)
      : value(value),
        reciprocal(__frcp_rn(value)),
        rest(__fmul_rn(fmaf(-reciprocal, value, 1.0f), reciprocal)),
        moderate(value > 9.5e-7f && value < 1.0e6f) {}

  __device__ __forceinline__ float quotient(float number) const {
    const float found = fmaf(number, reciprocal, __fmul_rn(number, rest));
    return fmaf(fmaf(-found, value, number), reciprocal, found);
  }
  __device__ __forceinline__ bool serves(const float (&numbers)[4]) const {
    const float largest = fmaxf(fmaxf(fabsf(numbers[0]), fabsf(numbers[1])), fmaxf(fabsf(numbers[2]), fabsf(numbers[3])));
    const float least = fminf(fminf(fabsf(numbers[0]), fabsf(numbers[1])), fminf(fabsf(numbers[2]), fabsf(numbers[3])));
    return moderate && least > 1e-18f && largest < 1e18f;
  }
  __device__ __forceinline__ void divide(float (&numbers)[4]) const {
    if (serves(numbers)) {
#pragma unroll
      for (int e = 0; e < 4; ++e) numbers[e] = quotient(numbers[e]);
    } else {
      divide_special(numbers);
    }
  }
  // Zeros and infinities, which stay, beside others.
  __device__ __forceinline__ void divide_special(float (&numbers)[4]) const {
    const auto stays = [](float number) { return number == 0.0f || fabsf(number) == -minus_infinity(); };
    float others[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) others[e] = stays(numbers[e]) ? 1.0f : numbers[e];
    if (serves(others)) {
#pragma unroll
      for (int e = 0; e < 4; ++e) numbers[e] = stays(numbers[e]) ? numbers[e] : quotient(others[e]);
    } else {
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {
        const float number = e < 2 ? (e == 0 ? numbers[0] : numbers[1]) : (e == 2 ? numbers[2] : numbers[3]);
        const float found = __fdiv_rn(number, value);
        if (e == 0) numbers[0] = found;
        if (e == 1) numbers[1] = found;
        if (e == 2) numbers[2] = found;
        if (e == 3) numbers[3] = found;
      }
    }
  }
};

// Divides this thread's part of the slice, `num_tokens` of whose places are in the vocabulary, by `temperature`; `found` are the
// extremes before, of some part of the row, and what it returns those after, of the same part or of this thread's.
template <class Config>
__device__ __forceinline__ Extremes divide_slice(float* slice, int num_tokens, float temperature, Extremes found) {
  const Divisor divisor(temperature);
  __syncwarp();  // other lanes may have read these places from memory
  if (divisor.moderate) {
    for_each_four<Config, 2>(slice, [&](int place, float4 four) {
      if (place >= num_tokens) return;
      Pack<float, 16> part = {{four.x, four.y, four.z, four.w}};
      divisor.divide(part.data);
      store_pack(slice + place, part);
    });
    // Quotients are in the order of what is divided.
    return {__fdiv_rn(found.largest, temperature), __fdiv_rn(found.smallest, temperature)};
  }
  found = {minus_infinity(), -minus_infinity()};
  for_each_four<Config, 1>(slice, [&](int place, float4 four) {
#pragma unroll 1
    for (int e = 0; e < 4; ++e) {
      if (place + e < num_tokens) {
        const float logit = __fdiv_rn(e < 2 ? (e == 0 ? four.x : four.y) : (e == 2 ? four.z : four.w), temperature);
        found.template take<Config>(logit);
        slice[place + e] = logit;
      }
    }
  });
  return found;
}

// Turns NaN among the first `num_tokens` places of this thread's part of the slice into -inf; returns the new extremes.
template <class Config>
__device__ __forceinline__ Extremes replace_nan(float* slice, int num_tokens) {
  Extremes found = {minus_infinity(), -minus_infinity()};
  for_each_four<Config, 1>(slice, [&](int place, float4) {
#pragma unroll 1
    for (int e = 0; e < 4; ++e) {
      if (place + e < num_tokens) {
        const float logit = slice[place + e];
        const float kept = logit == logit ? logit : minus_infinity();
        found.largest = fmaxf(found.largest, kept);
        found.smallest = fminf(found.smallest, kept);
        slice[place + e] = kept;
      }
    }
  });
  return found;
}

}  // namespace fi
