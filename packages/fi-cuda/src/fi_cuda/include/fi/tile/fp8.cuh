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

// What many numbers are divided by. Powers of 2 move scales below 2^-60 and above 2^60 to where no intermediate result that
// matters is subnormal or overflows; `lift` moves the numbers alike and takes the scale's sign.
struct Divisor {
  float lift;
  float scale;
  float inverse;
};

// 1 / x to nearest even for an x of 2^-100 to 2^100, 0 and infinity: what the compiler makes of __frcp_rn for such x, without
// the call for others.
__device__ __forceinline__ float inverse_of(float x) {
  float near;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(x));
  const float error = __fmaf_rn(x, near, -1.0f);
  return fabsf(error) < 1.0f ? __fmaf_rn(near, -error, near) : near;
}

__device__ __forceinline__ Divisor divisor_of(float scale) {
  const float size = fabsf(scale);
  const float lift = size < 0x1p-60f ? 0x1p80f : size > 0x1p60f ? 0x1p-80f : 1.0f;
  return {copysignf(lift, scale), size * lift, inverse_of(size * lift)};
}

// x / scale without a division (Markstein, 1990): the product with the inverse, then kSteps corrections by the remainder,
// which a fused multiply-add gives exactly. One step rounds as IEEE division does for every x of 11 significant bits or less
// (all 2^23 * 2^10 pairs of significands were tried), two for every float; not below 2^-18 nor above 2^40, where FP8 is zero
// or saturated. A remainder that is not finite marks quotients that are infinite, NaN, or of an infinite scale: as they are.
template <int kSteps>
__device__ __forceinline__ float quotient(float x, const Divisor& divisor) {
  const float lifted = __fmul_rn(x, divisor.lift);
  float result = __fmul_rn(lifted, divisor.inverse);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    // Negated, so that zeros keep their sign.
    const float remainder = __fmaf_rn(result, divisor.scale, -lifted);
    const float corrected = __fmaf_rn(remainder, -divisor.inverse, result);
    result = fabsf(remainder) < __int_as_float(0x7f800000) ? corrected : result;
  }
  return result;
}

// x / scale as IEEE division rounds it, saturated to the largest finite value, infinities included, and rounded to nearest
// even; NaN stays NaN. sm_89 and newer convert two values an instruction.
template <class Stored, class T, int kBytes>
__device__ __forceinline__ Pack<Stored, Pack<T, kBytes>::kCount> quantise(const Pack<T, kBytes>& x, const Divisor& divisor) {
  constexpr int kCount = Pack<T, kBytes>::kCount;
  constexpr int kSteps = sizeof(T) == 2 ? 1 : 2;
  Pack<Stored, kCount> stored;
  if constexpr (kCount == 1) {
    const float value = quotient<kSteps>(to_float(x.data[0]), divisor);
    stored.data[0].__x = __nv_cvt_float_to_fp8(value, __NV_SATFINITE, kFp8Format<Stored>);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; e += 2) {
      const float2 pair = {quotient<kSteps>(to_float(x.data[e]), divisor), quotient<kSteps>(to_float(x.data[e + 1]), divisor)};
      const __nv_fp8x2_storage_t both = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, kFp8Format<Stored>);
      // As one value: bytes would be taken apart and put together again.
      *reinterpret_cast<__nv_fp8x2_storage_t*>(&stored.data[e]) = both;
    }
  }
  return stored;
}

}  // namespace fi
