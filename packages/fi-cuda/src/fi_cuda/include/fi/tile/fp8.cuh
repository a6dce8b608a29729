// Quantisation to 8-bit floats (Micikevicius et al., 2022, section 3).
#pragma once

#include <cuda_fp8.h>

#include "fi/ptx/convert.cuh"
#include "fi/ptx/math.cuh"
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

// Four 8-bit floats as float16, exactly, the lowest first.
template <class Stored>
__device__ __forceinline__ void halves_of(unsigned& low, unsigned& high, unsigned bytes) {
  if constexpr (kFp8Format<Stored> == __NV_E4M3) ptx::halves_of_e4m3(low, high, bytes);
  else ptx::halves_of_e5m2(low, high, bytes);
}

// What many numbers are divided by. Powers of 2 move scales below 2^-60 and above 2^60 to where no intermediate result that
// matters is subnormal or overflows; `lift` moves the numbers alike and takes the scale's sign. The other members are those of
// the lifted scale; `near` and `rest`: its inverse rounded down, and a little more than what that lacks, never 0.
struct Divisor {
  float lift;
  float scale;
  float inverse;
  float near;
  float rest;
};

// 1 / x to nearest even for an x of 2^-100 to 2^100, 0 and infinity: what the compiler makes of __frcp_rn for such x, without
// the call for others.
__device__ __forceinline__ float inverse_of(float x) {
  const float near = ptx::rcp_approx(x);
  const float error = __fmaf_rn(x, near, -1.0f);
  return fabsf(error) < 1.0f ? __fmaf_rn(near, -error, near) : near;
}

__device__ __forceinline__ Divisor divisor_of(float scale) {
  const float given = fabsf(scale);
  const float lift = given < 0x1p-60f ? 0x1p80f : given > 0x1p60f ? 0x1p-80f : 1.0f;
  const float size = given * lift;
  const float inverse = inverse_of(size);
  const float near = __fmaf_rn(inverse, size, -1.0f) > 0.0f ? __int_as_float(__float_as_int(inverse) - 1) : inverse;
  // The next number above: the product is rounded, and what it lacks could tip a quotient that is nearly a tie.
  const float rest = __int_as_float(__float_as_int(fmaxf(__fmaf_rn(-near, size, 1.0f) * near, 0x1p-126f)) + 1);
  return {copysignf(lift, scale), size, inverse, near, rest};
}

// x / scale without a division, for an x of 11 significant bits or less and lifted: as IEEE division rounds it wherever
// that decides what FP8 value comes out (all 2^23 * 2^10 pairs of significands were tried). `rest` is not 0, so that an
// infinite x gives infinity and not NaN.
__device__ __forceinline__ float short_quotient(float x, const Divisor& divisor) {
  return __fmaf_rn(x, divisor.near, __fmul_rn(x, divisor.rest));
}

// x / scale for any lifted x (Markstein, 1990): the product with the inverse, then two corrections by the remainder, which a
// fused multiply-add gives exactly. IEEE division's rounding, but below 2^-18 and above 2^40, where FP8 is zero or
// saturated. A remainder that is not finite marks quotients that are infinite, NaN, or of an infinite scale: as they are.
__device__ __forceinline__ float quotient(float x, const Divisor& divisor) {
  float result = __fmul_rn(x, divisor.inverse);
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    // Negated, so that zeros keep their sign.
    const float remainder = __fmaf_rn(result, divisor.scale, -x);
    const float corrected = __fmaf_rn(remainder, -divisor.inverse, result);
    result = fabsf(remainder) < __int_as_float(0x7f800000) ? corrected : result;
  }
  return result;
}

// The elements of a pack, divided.
// kExact: always what IEEE division gives. Otherwise floats, too, take the short way, which can differ only where the quotient
// is within 2^-20 ulp of a middle between two floats, one of them a tie of the FP8 format: for results of a computation, which
// are themselves rounded more than that.
template <bool kExact, class T, int kBytes>
__device__ __forceinline__ void quotients(float (&values)[Pack<T, kBytes>::kCount], const Pack<T, kBytes>& x, const Divisor& divisor) {
  constexpr int kCount = Pack<T, kBytes>::kCount;
  constexpr bool kIsShort = sizeof(T) == 2 || !kExact;
  to_floats(values, x);
  if (divisor.lift != 1.0f) {
    asm volatile("");  // a branch, seldom taken, instead of predicated instructions
#pragma unroll
    for (int e = 0; e < kCount; ++e) values[e] = __fmul_rn(values[e], divisor.lift);
  }
#pragma unroll
  for (int e = 0; e < kCount; ++e) values[e] = kIsShort ? short_quotient(values[e], divisor) : quotient(values[e], divisor);
}

// Two numbers saturated to the largest finite value, infinities included, and rounded to nearest even, the first in the low byte;
// NaN stays NaN. One instruction on sm_89 and newer.
template <class Stored>
__device__ __forceinline__ __nv_fp8x2_storage_t fp8x2_of(float first, float second) {
  return __nv_cvt_float2_to_fp8x2({first, second}, __NV_SATFINITE, kFp8Format<Stored>);
}

// x / scale, rounded as fp8x2_of does.
template <class Stored, bool kExact = true, class T, int kBytes>
__device__ __forceinline__ Pack<Stored, Pack<T, kBytes>::kCount> quantise(const Pack<T, kBytes>& x, const Divisor& divisor) {
  constexpr int kCount = Pack<T, kBytes>::kCount;
  float values[kCount];
  quotients<kExact>(values, x, divisor);
  Pack<Stored, kCount> stored;
  if constexpr (kCount == 1) {
    stored.data[0].__x = __nv_cvt_float_to_fp8(values[0], __NV_SATFINITE, kFp8Format<Stored>);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; e += 2) {
      // As one value: bytes would be taken apart and put together again.
      *reinterpret_cast<__nv_fp8x2_storage_t*>(&stored.data[e]) = fp8x2_of<Stored>(values[e], values[e + 1]);
    }
  }
  return stored;
}

// The same of 8 elements as two words: packs of bytes that become parts of a larger store are taken apart and put together again,
// some 5 instructions for two of them.
template <class Stored, bool kExact = true, class T, int kBytes>
__device__ __forceinline__ uint2 quantised_words(const Pack<T, kBytes>& x, const Divisor& divisor) {
  static_assert(Pack<T, kBytes>::kCount == 8);
  float values[8];
  quotients<kExact>(values, x, divisor);
  const auto word = [&](int e) {
    return fp8x2_of<Stored>(values[e], values[e + 1]) | static_cast<unsigned>(fp8x2_of<Stored>(values[e + 2], values[e + 3])) << 16;
  };
  return {word(0), word(4)};
}

}  // namespace fi
