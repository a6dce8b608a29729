// From a scaled logit to its fixed-point mass, as fi_core.sample defines it: weight exp(-c) of the shortfall c = max - l,
// mass trunc(weight * 2^32).
#pragma once

#include "fi/ptx/math.cuh"
#include "fi/tile/host_device.cuh"

namespace fi {

// From here on a weight is below 2^-32 and the mass zero, whatever the exponential's rounding: exp(-22.25) < 0.94 * 2^-32.
constexpr float kMasslessShortfall = 22.25f;

// exp(-shortfall), shortfall >= 0, within about 3 ulp: the product with log2(e) is carried in two floats, because its rounding
// alone would cost 2^-19 at a shortfall of 22. 1 for 0; 0 from 88 on.
__device__ __forceinline__ float weight_of(float shortfall) {
  constexpr float kLog2E = 1.44269504f, kLog2ELow = 1.925963033e-8f, kLn2 = 0.693147181f;
  const float bounded = fminf(shortfall, 200.0f);
  const float high = bounded * -kLog2E;
  const float low = fmaf(bounded, -kLog2ELow, fmaf(bounded, -kLog2E, -high));
  const float power = ptx::exp2_approx(high);
  return fmaf(power, low * kLn2, power);
}

__device__ __forceinline__ uint64 mass_of(float weight) {
  // The conversion saturates below 2^32, which is the mass of weight 1.
  return static_cast<uint64>(__float2uint_rz(weight * 4294967296.0f)) + (weight >= 1.0f ? 1u : 0u);
}

__device__ __forceinline__ uint64 mass_at(float shortfall) { return mass_of(weight_of(shortfall)); }

// Unsigned integers in the order of the floats, -0 and 0 equal; for numbers that are not NaN.
__device__ __forceinline__ unsigned order_key(float value) {
  const unsigned bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace fi
