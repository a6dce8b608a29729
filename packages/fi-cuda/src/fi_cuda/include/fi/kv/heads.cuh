// A thread's share of one token's heads, held in registers between the load and the store.
#pragma once

#include "fi/tile/stored.cuh"
#include "fi/rope/rotate.cuh"
#include "fi/tile/pack.cuh"
#include "fi/tile/rows.cuh"

namespace fi {

// Which dims a thread holds, of which heads: the same dims of every kLanes-th head from first_head on.
struct HeadShare {
  int dim;
  bool rotated;  // a unit of pairs (fi/rope/rotate.cuh): a second pack besides the one at `dim`
  int first_head;
  int num_heads;

  // Elements before its part of first_head in a row of heads.
  __device__ __forceinline__ int64 offset(int64 head_stride) const { return first_head * head_stride + dim; }
};

// How kThreads threads share heads of kDim dims, of which the first kRotaryDim rotate (0: none) or at least are taken in units of
// pairs, two packs: kUnits threads take a head,
// kLanes heads are in work at once, kRounds a thread. kWhole: every thread has all its rounds, so that no head needs a check.
template <class T, int kCount_, int kDim, int kRotaryDim_, int kPairs_, int kThreads, int kRounds_, bool kWhole_>
struct HeadSplit {
  using Element = T;
  static constexpr int kCount = kCount_;
  static constexpr int kRotaryDim = kRotaryDim_;
  static constexpr int kPairs = kPairs_;
  static constexpr int kRounds = kRounds_;
  static constexpr bool kWhole = kWhole_;
  static constexpr int kHeld = kRounds > 0 ? kRounds : 1;  // length of arrays, which cannot be 0
  static constexpr int kRotatedUnits = kRotaryDim / 2 / kCount;
  static constexpr int kUnits = kRotatedUnits + (kDim - kRotaryDim) / kCount;
  static constexpr int kLanes = kThreads / kUnits;
  static constexpr int kSecond = kPairs == kHalf ? kRotaryDim / 2 : kCount;
  static_assert(kLanes > 0, "a head has more units than there are threads");
  static_assert(!kWhole || kThreads % kUnits == 0, "threads are left over");
  static_assert(kDim % kCount == 0 && kRotaryDim / 2 % kCount == 0, "packs do not tile the head");

  // The share of `thread` in the heads of slice `slice`; threads that are left over get no head.
  static __device__ __forceinline__ HeadShare share(unsigned thread, int slice, int num_heads) {
    const int unit = static_cast<int>(thread % kUnits);
    const int lane = static_cast<int>(thread / kUnits);
    HeadShare share;
    share.rotated = unit < kRotatedUnits;
    share.dim = share.rotated ? unit * kCount * (kPairs == kHalf ? 1 : 2) : kRotaryDim + (unit - kRotatedUnits) * kCount;
    share.first_head = slice * kRounds * kLanes + lane;
    share.num_heads = lane < kLanes ? num_heads : 0;
    return share;
  }
};

// What a thread's heads are divided by when they are stored as FP8; 1 for other formats. kPerHead: each by its own.
template <class Split, class Stored, bool kPerHead>
struct HeadScales {
  float data[kPerHead ? Split::kHeld : 1];

  // One float a head `stride` apart, or one for all (0); `scale` if there are none (null).
  __device__ __forceinline__ void load(const void* scales, int stride, float scale, const HeadShare& share) {
#pragma unroll
    for (int round = 0; round < (kPerHead ? Split::kRounds : 1); ++round) {
      const int head = kPerHead ? share.first_head + round * Split::kLanes : 0;
      const bool given = kIsFp8<Stored> && scales != nullptr && (!kPerHead || Split::kWhole || head < share.num_heads);
      data[round] = given ? static_cast<const float*>(scales)[head * stride] : scale;
    }
  }
};

template <class Split>
struct HeldHeads {
  using T = typename Split::Element;
  static constexpr int kBytes = Split::kCount * static_cast<int>(sizeof(T));

  Pack<T, kBytes> first[Split::kHeld];
  Pack<T, kBytes> second[Split::kRotaryDim > 0 ? Split::kHeld : 1];

  // `first_source` is a thread's part of its first head in a token's row of heads, head_stride elements apart.
  __device__ __forceinline__ void load(const T* first_source, int64 head_stride, const HeadShare& share) {
#pragma unroll
    for (int round = 0; round < Split::kRounds; ++round) {
      const int head = share.first_head + round * Split::kLanes;
      if (Split::kWhole || head < share.num_heads) {
        const T* source = first_source + round * Split::kLanes * head_stride;
        first[round] = load_pack<kBytes>(source);
        if constexpr (Split::kRotaryDim > 0) {
          if (share.rotated) second[round] = load_pack<kBytes>(source + Split::kSecond);
        }
      }
    }
  }

  // What is loaded behind `load` and before this is asked for before the packs are waited for.
  __device__ __forceinline__ void keep() {
#pragma unroll
    for (int round = 0; round < Split::kRounds; ++round) {
      keep_whole(first[round]);
      if constexpr (Split::kRotaryDim > 0) keep_whole(second[round]);
    }
  }

  // Rotates units of pairs if kRotates, converts (fi/tile/stored.cuh) and stores from first_target on. kStreaming: packs are 16
  // bytes. Neighbouring packs of 8 bytes of FP8 that do not rotate are stored as one.
  template <bool kStreaming, bool kRotates = true, class Stored, bool kPerHead>
  __device__ __forceinline__ void store(Stored* first_target, int64 head_stride, const HeadShare& share,
                                        const Rotation<Split::kCount>& rotation,
                                        const HeadScales<Split, Stored, kPerHead>& scales) {
    constexpr bool kAllPairs = Split::kRotaryDim > 0 && Split::kUnits == Split::kRotatedUnits;
    constexpr bool kJoins = !kRotates && kAllPairs && Split::kSecond == Split::kCount && Split::kCount == 8 && kIsFp8<Stored>;
    Divisor divisor = divisor_of(scales.data[0]);
#pragma unroll
    for (int round = 0; round < Split::kRounds; ++round) {
      const int head = share.first_head + round * Split::kLanes;
      if (Split::kWhole || head < share.num_heads) {
        Stored* target = first_target + round * Split::kLanes * head_stride;
        if (kPerHead && round > 0) divisor = divisor_of(scales.data[round]);
        if constexpr (kJoins) {
          static_assert(!kStreaming);
          const uint2 low = quantised_words<Stored>(first[round], divisor), high = quantised_words<Stored>(second[round], divisor);
          __stwb(reinterpret_cast<uint4*>(target), make_uint4(low.x, low.y, high.x, high.y));
        } else {
          if constexpr (Split::kRotaryDim > 0) {
            if (share.rotated) {
              if constexpr (kRotates) rotate<Split::kPairs>(first[round], second[round], rotation);
              put<kStreaming>(target + Split::kSecond, stored_as<Stored>(second[round], divisor));
            }
          }
          put<kStreaming>(target, stored_as<Stored>(first[round], divisor));
        }
      }
    }
  }

  template <bool kStreaming, class Packed, class Stored>
  static __device__ __forceinline__ void put(Stored* target, const Packed& pack) {
    if constexpr (kStreaming) {
      stream_pack(target, pack);
    } else {
      store_whole(target, pack);
    }
  }
};

}  // namespace fi
