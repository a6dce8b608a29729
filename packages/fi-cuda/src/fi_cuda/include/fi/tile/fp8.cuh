// Quantisation to 8-bit floats (Micikevicius et al., 2022, section 3).
#pragma once

#include <cuda_fp8.h>

#include "fi/tile/pack.cuh"

namespace fi {

template <class T>
inline constexpr bool kIsFp8 = false;
template <>
inline constexpr bool kIsFp8<__nv_fp8_e4m3> = true;
template <>
inline constexpr bool kIsFp8<__nv_fp8_e5m2> = true;

template <class Stored>
inline constexpr __nv_fp8_interpretation_t kFp8Format = __NV_E4M3;
template <>
inline constexpr __nv_fp8_interpretation_t kFp8Format<__nv_fp8_e5m2> = __NV_E5M2;

// x / scale (an IEEE division), saturated to the largest finite value, infinities included, and rounded to nearest even; NaN
// stays NaN.
template <class Stored, class T, int kBytes>
__device__ __forceinline__ Pack<Stored, Pack<T, kBytes>::kCount> quantise(const Pack<T, kBytes>& x, float scale) {
  constexpr int kCount = Pack<T, kBytes>::kCount;
  Pack<Stored, kCount> stored;
  if constexpr (kCount == 1) {
    const float value = __fdiv_rn(to_float(x.data[0]), scale);
    stored.data[0].__x = __nv_cvt_float_to_fp8(value, __NV_SATFINITE, kFp8Format<Stored>);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; e += 2) {
      const float2 pair = {__fdiv_rn(to_float(x.data[e]), scale), __fdiv_rn(to_float(x.data[e + 1]), scale)};
      const __nv_fp8x2_storage_t both = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, kFp8Format<Stored>);
      stored.data[e].__x = static_cast<__nv_fp8_storage_t>(both);
      stored.data[e + 1].__x = static_cast<__nv_fp8_storage_t>(both >> 8);
    }
  }
  return stored;
}

}  // namespace fi
