// Natural logits in base 2, where an exponential is one instruction.
#pragma once

#include "fi/ptx/math.cuh"

namespace fi {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 2^x for x below 127 without the special unit, within a relative 7.5e-5, 4 % of what rounding to bfloat16 adds: 2^n * p(x - n),
// n the integer next to x, p of degree 3 ("FlashAttention-4", 2025; coefficients by the Remez criterion for |x - n| <= 1/2).
// 0 below -127; NaN stays NaN.
__device__ __forceinline__ float exp2_polynomial(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: a sum with it has its integer part in the low bits
  x = ptx::max_or_nan(x, -127.0f);
  const float shifted = x + kShift, rest = x - (shifted - kShift);
  const float value = fmaf(fmaf(fmaf(0.05517167f, rest, 0.24261113f), rest, 0.69326097f), rest, 0.99992806f);
  return value * __uint_as_float((__float_as_uint(shifted) << 23) + (127u << 23));
}

}  // namespace fi
