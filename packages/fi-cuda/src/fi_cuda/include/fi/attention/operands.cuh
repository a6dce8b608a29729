// Operands of the products of short queries, with KV on the 16-row side of mma.m16n8k16: S^T [tokens, rows] = K Q^T and
// O^T [dims, rows] += V^T P^T. A tile of 8 query rows wastes no row, and a token's exponentials are those of real rows.
//
// Lane l is written 4 g + t. 16-bit keys and values are multiplied as they are. FP8 ones become float16, which holds them
// exactly, in registers: a 32-bit register of bytes then gives elements 4 t .. 4 t + 3 of the inner dim instead of 2 t, 2 t + 1
// and 2 t + 8, 2 t + 9, so Q takes the same order; and the rows g and g + 8 of V^T are its dims 2 g and 2 g + 1.
#pragma once

#include "fi/attention/stage.cuh"
#include "fi/ptx/ldmatrix.cuh"
#include "fi/ptx/mma.cuh"
#include "fi/tile/fp8.cuh"

namespace fi {

template <bool kFp8, class Dtype, class Instead = __half>
struct FactorOf {
  using Type = Dtype;
};
template <class Dtype, class Instead>
struct FactorOf<true, Dtype, Instead> {
  using Type = Instead;
};

template <class First, class Second>
inline constexpr bool kSame = false;
template <class Both>
inline constexpr bool kSame<Both, Both> = true;

template <class Config>
struct Operands {
  using Stored = typename Config::Stored;
  using Stage = ChunkStage<Config>;
  static constexpr bool kFp8 = kIsFp8<Stored>;
  using Factor = typename FactorOf<kFp8, typename Config::Dtype>::Type;  // what is multiplied
  static constexpr int kSteps = Config::kHeadDim / 16;       // of the inner dim of S^T
  static constexpr int kDimTiles = Config::kHeadDimVo / 16;  // of the outer dim of O^T

  // Two floats as T, rounded to nearest even, the first in the low half; and back.
  template <class T>
  static __device__ __forceinline__ unsigned packed(float low, float high) {
    const Pack<T, 4> both = {{from_float<T>(low), from_float<T>(high)}};
    return *reinterpret_cast<const unsigned*>(&both);
  }
  template <class T>
  static __device__ __forceinline__ float2 unpacked(unsigned both) {
    const Pack<T, 4> pack = *reinterpret_cast<const Pack<T, 4>*>(&both);
    return {to_float(pack.data[0]), to_float(pack.data[1])};
  }

  // The fragment of dims 16 step .. 16 step + 15 of K of the stage's tokens 16 tile .. 16 tile + 15.
  static __device__ __forceinline__ void load_keys(unsigned (&a)[4], const unsigned char* stage, int tile, int step, int lane) {
    const int row = lane % 16;
    if constexpr (!kFp8) {
      ptx::ldmatrix_x4(a, stage + Stage::Keys::place(tile * 16, row, step * 32, lane / 16 * 16));
    } else {
      unsigned bytes[2];
      ptx::ldmatrix_x2(bytes, stage + Stage::Keys::place(tile * 16, row, step * 16, 0));
      halves_of<Stored>(a[0], a[2], bytes[0]);
      halves_of<Stored>(a[1], a[3], bytes[1]);
    }
  }

  // Calls use(step, a) for every 16 dims of K with load_keys' fragment.
  template <class Use>
  static __device__ __forceinline__ void for_keys(const unsigned char* stage, int tile, int lane, Use&& use) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      unsigned a[4];
      load_keys(a, stage, tile, step, lane);
      use(step, a);
    }
  }

  // Calls use(dim_tile, a) for every 16 dims of V with the fragment of V^T over the same tokens.
  template <class Use>
  static __device__ __forceinline__ void for_values(const unsigned char* stage, int token_tile, int lane, Use&& use) {
    const unsigned char* values = stage + Stage::kValueBegin;
    const int row = kFp8 ? lane % 16 : lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int tile = 0; tile < kDimTiles; ++tile) {
      unsigned a[4];
      if constexpr (!kFp8) {
        ptx::ldmatrix_x4_trans(a, values + Stage::Values::place(token_tile * 16, row, tile * 32, lane / 8 % 2 * 16));
      } else {
        unsigned bytes[2];
        ptx::ldmatrix_x2_trans(bytes, values + Stage::Values::place(token_tile * 16, row, tile * 16, 0));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Dim 2 g of tokens 2 t and 2 t + 1, then dim 2 g + 1.
          halves_of<Stored>(a[2 * half], a[2 * half + 1], __byte_perm(bytes[half], 0, 0x3120));
        }
      }
      use(tile, a);
    }
  }

  // First of the two neighbouring dims that register `half` of a step of Q holds in lane 4 g + t.
  static __device__ __forceinline__ int query_dim(int step, int half, int t) {
    return step * 16 + (kFp8 ? 4 * t + 2 * half : 2 * t + 8 * half);
  }

  // The dim of element `half` (row g or g + 8) of a dim tile's accumulator in lane 4 g + t.
  static __device__ __forceinline__ int value_dim(int tile, int half, int g) {
    return tile * 16 + (kFp8 ? 2 * g + half : g + 8 * half);
  }
};

}  // namespace fi
