// A row of logits held by a cluster: each block keeps a slice of consecutive tokens in its shared memory as scaled float32,
// each warp a part of the slice. Places past the vocabulary hold NaN, which no comparison takes and which has no mass.
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
  static constexpr int kRounds = (kWarpTokens + 127) / 128;
};

constexpr int kNoPlace = 0x3fffffff;

__device__ __forceinline__ float no_logit() { return __int_as_float(0x7fffffff); }

// The place, a multiple of 4, of this thread's part of the slice whose turn is round `round`; kNoPlace if it has none.
template <class Config>
__device__ __forceinline__ int place_of_round(int round) {
  using Shape = RowShape<Config>;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int offset = (round * 32 + lane) * 4;
  return Shape::kWarpTokens % 128 == 0 || offset < Shape::kWarpTokens ? warp * Shape::kWarpTokens + offset : kNoPlace;
}

// The four logits there; at kNoPlace no_logit.
__device__ __forceinline__ float4 four_at(const float* slice, int place) {
  const float none = no_logit();
  return place == kNoPlace ? make_float4(none, none, none, none) : *reinterpret_cast<const float4*>(slice + place);
}

// Calls visit(place, four logits as float4) for each place of this thread's part of the slice. All lanes of a warp call it
// together, with kNoPlace too.
template <class Config, int kUnroll = 2, class Visit>
__device__ __forceinline__ void for_each_four(const float* slice, Visit visit) {
#pragma unroll kUnroll
  for (int round = 0; round < RowShape<Config>::kRounds; ++round) {
    const int place = place_of_round<Config>(round);
    visit(place, four_at(slice, place));
  }
}

struct Extremes {
  float largest, smallest;  // largest: NaN if any logit is; smallest only if Config::kSmallest

  template <class Config>
  __device__ __forceinline__ void take(float logit) {
    largest = ptx::max_or_nan(largest, logit);
    if (Config::kSmallest) smallest = fminf(smallest, logit);
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
// under way, so that what it loads comes with them. With kMasks, which it may share with the block, allowed(place) has bits for
// the tokens from `place` up to the next multiple of 32, set for those that stay, and patched(place) those that
// are no part of the extremes yet.
struct PlainStage {
  static constexpr bool kMasks = false;
  __device__ __forceinline__ void begun() {}
};

// A token on its way, number `e` of a pack with these bits: -inf if it does not stay. Taken for the extremes, of which the
// smallest may be less than it is where a token is patched.
template <class Config, bool kMasks>
__device__ __forceinline__ float pass(Extremes& found, float logit, unsigned allowed, unsigned patched, int e) {
  if (kMasks && (allowed >> e & 1) == 0) logit = minus_infinity();
  found.largest = ptx::max_or_nan(found.largest, kMasks && (patched >> e & 1) != 0 ? minus_infinity() : logit);
  if (Config::kSmallest) found.smallest = fminf(found.smallest, logit);
  return logit;
}

// load_slice of elements that need no conversion. All of a thread's copies are under way at once and take no registers; each
// thread then reads what it copied itself, so no barrier is needed.
template <class Config, class Stage>
__device__ __forceinline__ Extremes copy_slice(const float* row, int first_token, int vocab_size, float* slice, Stage& stage) {
  using Shape = RowShape<Config>;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int first = warp * Shape::kWarpTokens + lane * 4, room = Shape::kWarpTokens - lane * 4;
  const float* from = row + first_token + first;
  float* to = slice + first;
  const int left = min(vocab_size - first_token - first, room);  // a pack lies in the vocabulary whole or not at all
  if (Shape::kWarpTokens % 128 == 0 && left == room) {
    // Addresses are constants beside these two.
#pragma unroll
    for (int offset = 0; offset < Shape::kWarpTokens; offset += 128) ptx::cp_async_16(to + offset, from + offset, true);
  } else {
#pragma unroll 1
    for (int offset = 0; offset < left; offset += 128) ptx::cp_async_16(to + offset, from + offset, true);
  }
  ptx::cp_async_commit();
  stage.begun();
#pragma unroll 1
  for (int offset = max(left + 127, 0) / 128 * 128; offset < room; offset += 128) {
    const float none = no_logit();
    *reinterpret_cast<float4*>(to + offset) = make_float4(none, none, none, none);
  }
  ptx::cp_async_wait<0>();
  Extremes found = {minus_infinity(), -minus_infinity()};
#pragma unroll 4
  for (int offset = 0; offset < left; offset += 128) {
    const float4 four = *reinterpret_cast<const float4*>(to + offset);
    Pack<float, 16> part = {{four.x, four.y, four.z, four.w}};
    unsigned allowed = 0xfu, patched = 0;
    if constexpr (Stage::kMasks) {
      allowed = stage.allowed(first + offset);
      patched = stage.patched(first + offset);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) part.data[e] = pass<Config, Stage::kMasks>(found, part.data[e], allowed, patched, e);
    if (Stage::kMasks && (allowed & 0xfu) != 0xfu) store_pack(to + offset, part);
  }
  return found;
}

// Reads this thread's part of the slice that begins at `first_token`. Returns the thread's extremes.
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
  constexpr int kMost = Config::kResidentBlocks == 1 ? 8 : Stage::kMasks && sizeof(T) < 4 ? kNarrow : 4;
  constexpr int kBatch = kRounds < kMost ? kRounds : kMost;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
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
        unsigned allowed = 0, patched = 0;
        if constexpr (Stage::kMasks) {
          // A pack never crosses a word: parts and packs begin at multiples of its tokens.
          allowed = stage.allowed(place);
          patched = stage.patched(place);
        }
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          float logit = no_logit();
          if (inside) logit = pass<Config, Stage::kMasks>(found, to_float(held[idx].data[e]), allowed, patched, e);
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

// Divides this thread's part of the slice, `num_tokens` of whose places are in the vocabulary, by `temperature`; returns the
// new extremes.
template <class Config>
__device__ __forceinline__ Extremes divide_slice(float* slice, int num_tokens, float temperature) {
  Extremes found = {minus_infinity(), -minus_infinity()};
  __syncwarp();  // other lanes may have read these places from memory
  for_each_four<Config, 1>(slice, [&](int place, float4 four) {
    Pack<float, 16> part = {{four.x, four.y, four.z, four.w}};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      part.data[e] = __fdiv_rn(part.data[e], temperature);
      if (place + e < num_tokens) {
        found.largest = ptx::max_or_nan(found.largest, part.data[e]);
        found.smallest = fminf(found.smallest, part.data[e]);
      }
    }
    if (place != kNoPlace) store_pack(slice + place, part);
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
