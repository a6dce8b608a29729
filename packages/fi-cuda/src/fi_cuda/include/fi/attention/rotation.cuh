// RoPE within attention (RoFormer, Su et al., 2021, section 3.4): of query rows as they are loaded, and of keys that the cache
// holds unrotated, at their position in the cache.
//
// The angles of a few positions are computed by the lanes of a warp together, reduced in double, and shared through its
// scratch in shared memory. A key's angle is the sum of that of a position that 8 divides within its item and that of the 0 to
// 7 tokens from there on, which the block has in a table: four multiplications and additions a pair, exact to float's rounding
// at any position.
#pragma once

#include "fi/attention/operands.cuh"
#include "fi/rope/rotate.cuh"

namespace fi {

template <class Config>
struct Rotations {
  static constexpr bool kQueries = Config::kRotaryDim > 0;
  static constexpr bool kKeys = kQueries && Config::kRopeKeys;
  static constexpr int kPairs = Config::kRotaryDim / 2;
  static constexpr int kGroupTokens = 8;  // whose angles differ by the table's
  static constexpr int kGroups = kKeys ? Config::kChunkTokens / kGroupTokens : 1;
  static constexpr int kPitch = kPairs | 8;  // neighbouring rows then differ in bank
  static constexpr int kTableRows = kKeys ? kGroupTokens : 0;
  static constexpr int kBytes =
      kQueries ? (kTableRows * kPitch + Config::kNumWarps * kGroups * kPairs) * static_cast<int>(sizeof(float2)) : 0;
  // Rotated, a key may be sqrt(2) times as large, which is too much for the float16 in the place of the largest e5m2.
  static constexpr bool kHalved = kKeys && Operands<Config>::template kSame<typename Config::Stored, __nv_fp8_e5m2>;
  static_assert(Config::kRopePairs != kHalf || Config::kRotaryDim % 32 == 0, "a lane holds both elements of a pair");
  static_assert(Config::kRotaryDim % 16 == 0, "steps of the product rotate as a whole");
};

// cos and sin of the pairs that one register of a fragment holds the first or both elements of.
struct PairAngles {
  float2 cos_sin[2];  // of interleaved pairs: the first only
};

template <class Config>
class Rotator {
  using Ops = Operands<Config>;
  using Size = Rotations<Config>;
  static constexpr int kPairs = Size::kPairs;
  static constexpr bool kInHalves = Config::kRopePairs == kHalf;
  static constexpr int kSteps = Config::kRotaryDim / 16;  // of the products' inner dim that rotate
  static constexpr int kFirstSteps = kInHalves ? kSteps / 2 : kSteps;

 public:
  // `shared`: Rotations::kBytes, a multiple of 16.
  __device__ __forceinline__ explicit Rotator(unsigned char* shared, const float* inv_freq, float factor)
      : table_(reinterpret_cast<float2*>(shared)), inv_freq_(inv_freq), factor_(factor),
        lane_(static_cast<int>(threadIdx.x) % 32) {
    bases_ = table_ + Size::kTableRows * Size::kPitch + static_cast<int>(threadIdx.x) / 32 * Size::kGroups * kPairs;
  }

  // The block's table; a barrier of the block has to follow.
  __device__ __forceinline__ void fill_table() const {
#pragma unroll 1
    for (int unit = threadIdx.x; unit < Size::kTableRows * kPairs; unit += Config::kNumThreads) {
      table_[unit / kPairs * Size::kPitch + unit % kPairs] = angle_at(unit / kPairs, unit % kPairs, 1.0f);
    }
  }

  // The angles of the chunk of keys that begins at `position`, for `keys`; what is there before is not used any more.
  __device__ __forceinline__ void prepare_keys(int position) const {
    __syncwarp();
#pragma unroll
    for (int pair = lane_; pair < kPairs; pair += 32) {
      float2 angle = angle_at(position, pair, Size::kHalved ? 0.5f * factor_ : factor_);
      // 8 tokens more are as much as 7 and 1.
      const float2 step = sum(table_[7 * Size::kPitch + pair], table_[Size::kPitch + pair]);
#pragma unroll
      for (int group = 0; group < Size::kGroups; ++group) {
        bases_[group * kPairs + pair] = angle;
        if (group + 1 < Size::kGroups) angle = sum(angle, step);
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
      const PairAngles within[2] = {angles_in(table_ + lane_ / 4 * Size::kPitch, step, 0),
                                    angles_in(table_ + lane_ / 4 * Size::kPitch, step, 1)};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        unsigned first[4], second[4];
        Ops::load_keys(first, stage, tile, step, lane_);
        if constexpr (kInHalves) Ops::load_keys(second, stage, tile, step + kFirstSteps, lane_);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int group = 0; group < 2; ++group) {
            const PairAngles base = angles_in(bases_ + (tile * 2 + group) * kPairs, step, half);
            const PairAngles angles = sum(base, within[half]);
            rotate<typename Ops::Factor>(first[2 * half + group], second[2 * half + group], angles);
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
      for (int pair = lane_; pair < kPairs; pair += 32) bases_[pair] = angle_at(offset + next, pair, factor_);
      __syncwarp();
      if (token != next) continue;
#pragma unroll
      for (int step = 0; step < kFirstSteps; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          unsigned none = 0;
          rotate<Held>(query[step][tile][half], kInHalves ? query[step + (kInHalves ? kFirstSteps : 0)][tile][half] : none,
                       angles_in(bases_, step, half));
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

  // Of the sum of two angles; factors multiply.
  static __device__ __forceinline__ float2 sum(float2 first, float2 second) {
    return {first.x * second.x - first.y * second.y, first.y * second.x + first.x * second.y};
  }

  static __device__ __forceinline__ PairAngles sum(const PairAngles& first, const PairAngles& second) {
    return {{sum(first.cos_sin[0], second.cos_sin[0]), sum(first.cos_sin[1], second.cos_sin[1])}};
  }

  __device__ __forceinline__ PairAngles angles_in(const float2* row, int step, int half) const {
    const int dim = Ops::query_dim(step, half, lane_ % 4);
    if constexpr (kInHalves) {
      const float4 two = *reinterpret_cast<const float4*>(row + dim);
      return {{{two.x, two.y}, {two.z, two.w}}};
    } else {
      return {{row[dim / 2], {}}};
    }
  }

  // Two elements of T: both of an interleaved pair, or the first of two pairs, whose second ones `second` holds.
  template <class T>
  static __device__ __forceinline__ void rotate(unsigned& first, unsigned& second, const PairAngles& angles) {
    const float2 a = Ops::template unpacked<T>(first), p = angles.cos_sin[0], q = angles.cos_sin[1];
    if constexpr (kInHalves) {
      const float2 b = Ops::template unpacked<T>(second);
      first = packed<T>(a.x * p.x - b.x * p.y, a.y * q.x - b.y * q.y);
      second = packed<T>(b.x * p.x + a.x * p.y, b.y * q.x + a.y * q.y);
    } else {
      first = packed<T>(a.x * p.x - a.y * p.y, a.y * p.x + a.x * p.y);
    }
  }

  template <class T>
  static __device__ __forceinline__ unsigned packed(float low, float high) {
    const float both[2] = {low, high};
    const Pack<T, 4> pack = rounded_pack<T>(both);
    return *reinterpret_cast<const unsigned*>(&pack);
  }

  float2* table_;
  float2* bases_;
  const float* inv_freq_;
  float factor_;
  int lane_;
};

}  // namespace fi
