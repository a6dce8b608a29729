// RoPE within attention (RoFormer, Su et al., 2021, section 3.4): of query rows as they are loaded, and of keys that the cache
// holds unrotated, at their position in the cache.
//
// The angles of a few positions are computed by the lanes of a warp together, reduced in double, and shared through its
// scratch in shared memory. A key's angle is the sum of that of a position that 8 divides within its item and that of the 0 to
// 7 tokens from there on, which the block has in a table: four multiplications and additions a pair, exact to the rounding of
// the type that angles are kept in, at any position.
#pragma once

#include "fi/attention/operands.cuh"
#include "fi/rope/rotate.cuh"

namespace fi {

// Angles of keys in float32, and of the pairs of one register of a fragment: those it holds both elements of, or the first ones.
template <class Config>
struct FloatAngles {
  using Ops = Operands<Config>;
  using Factor = typename Ops::Factor;
  static constexpr bool kInHalves = Config::kRopePairs == kHalf;
  static constexpr int kPairBytes = 8;
  float2 cos_sin[2];  // of interleaved pairs: the first only

  static __device__ __forceinline__ void put(unsigned char* row, int pair, float2 angle) {
    reinterpret_cast<float2*>(row)[pair] = angle;
  }

  // Of both registers of a step in lane 4 g + t.
  static __device__ __forceinline__ void get(FloatAngles (&angles)[2], const unsigned char* row, int step, int t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int dim = Ops::query_dim(step, half, t);
      if constexpr (kInHalves) {
        const float4 two = *reinterpret_cast<const float4*>(row + dim * kPairBytes);
        angles[half] = {{{two.x, two.y}, {two.z, two.w}}};
      } else {
        angles[half] = {{reinterpret_cast<const float2*>(row)[dim / 2], {}}};
      }
    }
  }

  // Of the sum of two angles; factors multiply.
  static __device__ __forceinline__ float2 sum(float2 first, float2 second) {
    return {first.x * second.x - first.y * second.y, first.y * second.x + first.x * second.y};
  }
  __device__ __forceinline__ FloatAngles plus(const FloatAngles& other) const {
    return {{sum(cos_sin[0], other.cos_sin[0]), sum(cos_sin[1], other.cos_sin[1])}};
  }

  // `first` and `second`: two elements of T each; without halves, `first` alone.
  template <class T = Factor>
  __device__ __forceinline__ void rotate(unsigned& first, unsigned& second) const {
    const float2 a = Ops::template unpacked<T>(first), p = cos_sin[0], q = cos_sin[1];
    if constexpr (kInHalves) {
      const float2 b = Ops::template unpacked<T>(second);
      first = packed<T>(a.x * p.x - b.x * p.y, a.y * q.x - b.y * q.y);
      second = packed<T>(b.x * p.x + a.x * p.y, b.y * q.x + a.y * q.y);
    } else {
      first = packed<T>(a.x * p.x - a.y * p.y, a.y * p.x + a.x * p.y);
    }
  }

 private:
  template <class T>
  static __device__ __forceinline__ unsigned packed(float low, float high) {
    const float both[2] = {low, high};
    const Pack<T, 4> pack = rounded_pack<T>(both);
    return *reinterpret_cast<const unsigned*>(&pack);
  }
};

// The same in float16, two pairs an instruction, for pairs in halves of keys that are float16 made of FP8: what float16 rounds
// off is a quarter of what bfloat16 does.
template <class Config>
struct HalfAngles {
  using Ops = Operands<Config>;
  static constexpr int kPairBytes = 4;
  __half2 cos, sin;  // of two neighbouring pairs

  static __device__ __forceinline__ void put(unsigned char* row, int pair, float2 angle) {
    __half* two = reinterpret_cast<__half*>(row) + pair / 2 * 4 + pair % 2;
    two[0] = __float2half_rn(angle.x), two[2] = __float2half_rn(angle.y);
  }

  // A step's registers hold four neighbouring dims.
  static __device__ __forceinline__ void get(HalfAngles (&angles)[2], const unsigned char* row, int step, int t) {
    const int4 four = *reinterpret_cast<const int4*>(row + Ops::query_dim(step, 0, t) * kPairBytes);
    angles[0] = {as_half2(four.x), as_half2(four.y)};
    angles[1] = {as_half2(four.z), as_half2(four.w)};
  }

  __device__ __forceinline__ HalfAngles plus(const HalfAngles& other) const {
    return {__hfma2(__hneg2(sin), other.sin, __hmul2(cos, other.cos)), __hfma2(sin, other.cos, __hmul2(cos, other.sin))};
  }

  __device__ __forceinline__ void rotate(unsigned& first, unsigned& second) const {
    const __half2 a = as_half2(first), b = as_half2(second);
    const __half2 turned = __hfma2(__hneg2(b), sin, __hmul2(a, cos)), other = __hfma2(a, sin, __hmul2(b, cos));
    first = *reinterpret_cast<const unsigned*>(&turned);
    second = *reinterpret_cast<const unsigned*>(&other);
  }

 private:
  static __device__ __forceinline__ __half2 as_half2(unsigned bits) { return *reinterpret_cast<const __half2*>(&bits); }
};

template <bool kHalves, class Config>
struct KeyAnglesOf {
  using Type = FloatAngles<Config>;
};
template <class Config>
struct KeyAnglesOf<true, Config> {
  using Type = HalfAngles<Config>;
};

template <class Config>
struct Rotations {
  using KeyAngles = typename KeyAnglesOf<Operands<Config>::kFp8 && Config::kRopePairs == kHalf, Config>::Type;
  static constexpr bool kQueries = Config::kRotaryDim > 0;
  static constexpr bool kKeys = kQueries && Config::kRopeKeys;
  static constexpr int kPairs = Config::kRotaryDim / 2;
  static constexpr int kGroupTokens = 8;  // whose angles differ by the table's
  static constexpr int kGroups = kKeys ? Config::kChunkTokens / kGroupTokens : 0;
  static constexpr int kRowBytes = kPairs * KeyAngles::kPairBytes;
  static constexpr int kPitch = kRowBytes | 64;  // neighbouring rows of the table then differ in bank
  static constexpr int kStepBytes = kKeys ? kPairs * static_cast<int>(sizeof(float2)) : 0;  // angles of 8 tokens
  static constexpr int kTableBytes = kKeys ? kGroupTokens * kPitch : 0;
  // A warp's: angles of the groups of a chunk of keys, or in float32 of a query's position.
  static constexpr int kKeyBytes = kGroups * kRowBytes, kQueryBytes = kPairs * static_cast<int>(sizeof(float2));
  static constexpr int kScratchBytes = kKeyBytes > kQueryBytes ? kKeyBytes : kQueryBytes;
  static constexpr int kBytes = kQueries ? kStepBytes + kTableBytes + Config::kNumWarps * kScratchBytes : 0;
  // Rotated, a key may be sqrt(2) times as large, which is too much for the float16 in the place of the largest e5m2.
  static constexpr bool kHalved = kKeys && kSame<typename Config::Stored, __nv_fp8_e5m2>;
  static_assert(Config::kRopePairs != kHalf || Config::kRotaryDim % 32 == 0, "a lane holds both elements of a pair");
  static_assert(Config::kRotaryDim % 16 == 0, "steps of the product rotate as a whole");
};

template <class Config>
class Rotator {
  using Ops = Operands<Config>;
  using Size = Rotations<Config>;
  using Angles = typename Size::KeyAngles;
  using QueryAngles = FloatAngles<Config>;
  static constexpr int kPairs = Size::kPairs;
  static constexpr bool kInHalves = Config::kRopePairs == kHalf;
  static constexpr int kSteps = Config::kRotaryDim / 16;  // of the products' inner dim that rotate
  static constexpr int kFirstSteps = kInHalves ? kSteps / 2 : kSteps;

 public:
  // `shared`: Rotations::kBytes, a multiple of 16.
  __device__ __forceinline__ Rotator(unsigned char* shared, const float* inv_freq, float factor)
      : step_(shared), table_(shared + Size::kStepBytes), inv_freq_(inv_freq), factor_(factor),
        lane_(static_cast<int>(threadIdx.x % 32)) {
    scratch_ = table_ + Size::kTableBytes + static_cast<int>(threadIdx.x / 32) * Size::kScratchBytes;
  }

  // What the warps of the block share; a barrier of the block has to follow.
  __device__ __forceinline__ void fill_table() const {
#pragma unroll 1
    for (int unit = threadIdx.x; unit < (Size::kGroupTokens + 1) * kPairs; unit += Config::kNumThreads) {
      const int token = unit / kPairs, pair = unit % kPairs;
      const float2 angle = angle_at(token, pair, 1.0f);
      if (token < Size::kGroupTokens) {
        Angles::put(table_ + token * Size::kPitch, pair, angle);
      } else {
        reinterpret_cast<float2*>(step_)[pair] = angle;
      }
    }
  }

  // The angles of the chunk of keys that begins at `position`, for `for_keys`; those of another chunk are not used any more.
  __device__ __forceinline__ void prepare_keys(int position) const {
    __syncwarp();
#pragma unroll
    for (int pair = lane_; pair < kPairs; pair += 32) {
      float2 angle = angle_at(position, pair, Size::kHalved ? 0.5f * factor_ : factor_);
      const float2 step = reinterpret_cast<const float2*>(step_)[pair];
#pragma unroll
      for (int group = 0; group < Size::kGroups; ++group) {
        Angles::put(scratch_ + group * Size::kRowBytes, pair, angle);
        angle = QueryAngles::sum(angle, step);
      }
    }
    __syncwarp();
  }

  // As Operands::for_keys for all kTiles token tiles of the chunk, with the keys rotated at its positions (prepare_keys); calls
  // use(tile, step, a), the tiles' fragments of a step together: they have a part of their angles in common.
  template <int kTiles, class Use>
  __device__ __forceinline__ void for_keys(const unsigned char* stage, Use&& use) const {
#pragma unroll
    for (int step = 0; step < kFirstSteps; ++step) {
      Angles within[2];
      Angles::get(within, table_ + lane_ / 4 * Size::kPitch, step, lane_ % 4);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        unsigned first[4], second[4];
        Ops::load_keys(first, stage, tile, step, lane_);
        if constexpr (kInHalves) Ops::load_keys(second, stage, tile, step + kFirstSteps, lane_);
#pragma unroll
        for (int group = 0; group < 2; ++group) {
          Angles base[2];
          Angles::get(base, scratch_ + (tile * 2 + group) * Size::kRowBytes, step, lane_ % 4);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            base[half].plus(within[half]).rotate(first[2 * half + group], second[2 * half + group]);
          }
        }
        use(tile, step, first);
        if constexpr (kInHalves) use(tile, step + kFirstSteps, second);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int step = kSteps; step < Ops::kSteps; ++step) {
        unsigned rest[4];
        Ops::load_keys(rest, stage, tile, step, lane_);
        use(tile, step, rest);
      }
    }
  }

  // Rotates a lane's elements of row lane / 4 of a row tile, `query` [steps][tiles][2] as Operands has them and packed as Held,
  // which belong to new token `token` (below 0: to none). The tile's tokens are first .. last; token 0 stands at `offset`.
  template <class Held, int kTiles>
  __device__ __forceinline__ void rotate_query(
      unsigned (&query)[Ops::kSteps][kTiles][2], int tile, int token, int first, int last, int offset) const {
#pragma unroll 1
    for (int next = first; next <= last; ++next) {
      __syncwarp();
#pragma unroll 1
      for (int pair = lane_; pair < kPairs; pair += 32) {
        QueryAngles::put(scratch_, pair, angle_at(offset + next, pair, factor_));
      }
      __syncwarp();
      if (token != next) continue;
#pragma unroll
      for (int step = 0; step < kFirstSteps; ++step) {
        QueryAngles angles[2];
        QueryAngles::get(angles, scratch_, step, lane_ % 4);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          unsigned none = 0;
          angles[half].template rotate<Held>(query[step][tile][half],
                                             kInHalves ? query[step + (kInHalves ? kFirstSteps : 0)][tile][half] : none);
        }
      }
    }
    __syncwarp();
  }

 private:
  __device__ __forceinline__ float2 angle_at(int position, int pair, float factor) const {
    const Rotation<1> rotation = rotation_of_pair(position, __ldg(inv_freq_ + pair), factor);
    return {rotation.cos[0], rotation.sin[0]};
  }

  unsigned char *step_, *table_, *scratch_;
  const float* inv_freq_;
  float factor_;
  int lane_;
};

}  // namespace fi
