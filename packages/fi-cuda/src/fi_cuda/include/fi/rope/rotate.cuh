// Rotary position embedding of a few pairs at a time (RoFormer, Su et al., 2021, section 3.4).
//
// A unit is kCount pairs: for "half" the packs at dims u * kCount and u * kCount + rotary_dim / 2, for "interleaved" the two
// neighbouring packs at 2 * u * kCount.
#pragma once

#include "fi/tile/pack.cuh"

namespace fi {

enum RopePairs { kNoRope = 0, kHalf = 1, kInterleaved = 2 };

// cos and sin of one unit's pairs, attention factor included.
template <int kCount>
struct Rotation {
  float cos[kCount];
  float sin[kCount];
};

// From a table row holding rotary_dim / 2 cosines, then as many sines. kBytes (4 to 16) divides the address of every unit.
template <int kCount, int kBytes = 4>
__device__ __forceinline__ Rotation<kCount> rotation_from_table(const float* row, int num_pairs, int first_pair) {
  constexpr int kFloats = kBytes / 4;
  static_assert(kCount % kFloats == 0, "loads tile the unit");
  Rotation<kCount> rotation;
#pragma unroll
  for (int pair = 0; pair < kCount; pair += kFloats) {
    const auto cos = load_pack<kBytes>(row + first_pair + pair);
    const auto sin = load_pack<kBytes>(row + num_pairs + first_pair + pair);
#pragma unroll
    for (int e = 0; e < kFloats; ++e) {
      rotation.cos[pair + e] = cos.data[e];
      rotation.sin[pair + e] = sin.data[e];
    }
  }
  return rotation;
}

// Of one pair, whose frequency is in radians a position. The angle is reduced to a fraction of a turn in double, where
// position times frequency is exact enough at any position, so the float functions see small arguments.
__device__ __forceinline__ Rotation<1> rotation_of_pair(long long position, float inv_freq, float factor) {
  constexpr double kTurnsPerRadian = 0.15915494309189535;
  const double turns = static_cast<double>(position) * static_cast<double>(inv_freq) * kTurnsPerRadian;
  const float half_turns = static_cast<float>(2.0 * (turns - rint(turns)));
  float sin, cos;
  sincospif(half_turns, &sin, &cos);
  return {{cos * factor}, {sin * factor}};
}

template <int kCount>
__device__ __forceinline__ Rotation<kCount> rotation_at(
    long long position, const float* inv_freq, int first_pair, float factor) {
  Rotation<kCount> rotation;
#pragma unroll
  for (int pair = 0; pair < kCount; ++pair) {
    const Rotation<1> one = rotation_of_pair(position, __ldg(inv_freq + first_pair + pair), factor);
    rotation.cos[pair] = one.cos[0];
    rotation.sin[pair] = one.sin[0];
  }
  return rotation;
}

// Rotates a unit held in two packs.
template <int kPairs, class T, int kBytes>
__device__ __forceinline__ void rotate(
    Pack<T, kBytes>& first, Pack<T, kBytes>& second, const Rotation<Pack<T, kBytes>::kCount>& rotation) {
  constexpr int kCount = Pack<T, kBytes>::kCount;
  float values[2][kCount], turned[2][kCount];
  to_floats(values[0], first);
  to_floats(values[1], second);
#pragma unroll
  for (int pair = 0; pair < kCount; ++pair) {
    // Of interleaved pairs a pack has both numbers, neighbours.
    const int a = kPairs == kHalf ? pair : 2 * pair, b = kPairs == kHalf ? kCount + pair : 2 * pair + 1;
    const float x = values[a / kCount][a % kCount], y = values[b / kCount][b % kCount];
    turned[a / kCount][a % kCount] = x * rotation.cos[pair] - y * rotation.sin[pair];
    turned[b / kCount][b % kCount] = y * rotation.cos[pair] + x * rotation.sin[pair];
  }
  first = rounded_pack<T>(turned[0]);
  second = rounded_pack<T>(turned[1]);
}

}  // namespace fi
