// From a scaled logit to its fixed-point mass, as fi_core.sample defines it: weight exp(-c) of the shortfall c = max - l,
// mass trunc(weight * 2^32).
#pragma once

#include "fi/ptx/math.cuh"
#include "fi/tile/host_device.cuh"

namespace fi {

// From here on a weight is below 2^-32 and the mass zero, whatever the exponential's rounding: exp(-22.25) < 0.94 * 2^-32.
constexpr float kMasslessShortfall = 22.25f;

// The smallest weight that has mass.
constexpr float kLeastWeight = 2.3283064e-10f;  // 2^-32

// exp(-shortfall) for 0 <= shortfall, infinity included: 1 for 0; 0 where it underflows. The hardware's exponential of a product
// rounded once: within a relative 7 * 2^-23 down to weights of 2^-16. Below, a mass is off by one at most.
__device__ __forceinline__ float weight_of(float shortfall) { return ptx::exp2_approx(shortfall * -1.44269504f); }

// The mass as its lower 16 bits and the rest; 0 for NaN. Rounding sums with 2^23 down leaves whole parts in the lowest bits, and
// what each takes away is exact: no conversion to an integer, of which a multiprocessor makes only 16 a cycle. Weights below 2
// have at most 2^17 in the second limb.
__device__ __forceinline__ uint2 mass_limbs(float weight) {
  constexpr float kWhole = 8388608.0f, kLimb = 65536.0f;
  const float bounded = fmaxf(weight, 0.0f);
  const float high = __fmaf_rd(bounded, kLimb, kWhole);
  const float rest = __fmaf_rn(bounded, kLimb, kWhole - high);
  const float low = __fmaf_rd(rest, kLimb, kWhole);
  return make_uint2(__float_as_uint(low) & 0xffffu, __float_as_uint(high) & 0x3ffffu);
}

__device__ __forceinline__ uint64 join_limbs(uint2 limbs) { return limbs.x + (static_cast<uint64>(limbs.y) << 16); }

__device__ __forceinline__ uint64 mass_of(float weight) { return join_limbs(mass_limbs(weight)); }

// The same for any shortfall, -inf's included, and for a NaN, which has no mass either.
__device__ __forceinline__ float weight_or_none(float shortfall) { return weight_of(fminf(shortfall, 64.0f)); }

// The exact sum of masses of up to 2^19 weights. A double from 2^20 to 2^21 is a multiple of 2^-32, so adding a weight, rounded
// down, truncates it as its mass is defined. One addition a weight, where limbs take four instructions and two additions.
struct MassSum {
  double sum = 1048576.0;

  // By hand, as conversions run at an eighth of the rate; what a zero or subnormal becomes is below 2^-120.
  __device__ __forceinline__ static double widen(float weight) {
    const unsigned bits = __float_as_uint(weight);
    return __hiloint2double(static_cast<int>((bits >> 3) + 0x38000000u), static_cast<int>(bits << 29));
  }
  __device__ __forceinline__ void add(double widened) { sum = __dadd_rd(sum, widened); }
  __device__ __forceinline__ void add(float weight) { add(widen(weight)); }
  __device__ __forceinline__ uint64 mass() const {
    return static_cast<uint64>(__double_as_longlong(sum)) - 0x4130000000000000ull;
  }
};

// The same of only those weights whose `value` is above a limit: added as products with 2^-7 or 0, since an addition that depends on
// a predicate becomes one and two selections.
struct MassSumAbove {
  double sum = 8192.0;
  // Lower half of the factor. Any number below 2^20 will do: what it adds to a product, rounding down takes away. A constant would be
  // moved into the pair of registers anew for each product.
  int low = static_cast<int>(threadIdx.x);

  // `widened` as MassSum::widen has it.
  __device__ __forceinline__ void add_if_above(double widened, float value, float limit) {
    // As the upper half of a double, 1.0f is 2^-7.
    sum = __fma_rd(widened, __hiloint2double(__float_as_int(value > limit ? 1.0f : 0.0f), low), sum);
  }
  __device__ __forceinline__ uint64 mass() const {
    return static_cast<uint64>(__double_as_longlong(sum)) - 0x40c0000000000000ull;
  }
};

// The mass as a float, exactly, times 2^-32: weights have 24 bits, so only those below 2^-9 have something to lose.
__device__ __forceinline__ float truncated(float weight) {
  constexpr float kLimit = 1.0f / 512;
  const float multiple = __fadd_rd(weight, kLimit) - kLimit;  // floats from 2^-9 to 2^-8 are multiples of 2^-32
  return weight < kLimit ? multiple : weight;
}

__device__ __forceinline__ uint64 mass_at(float shortfall) { return mass_of(weight_of(shortfall)); }

// Unsigned integers in the order of the floats, -0 and 0 equal, NaN (which the sum makes positive) above all.
__device__ __forceinline__ unsigned order_key(float value) {
  const unsigned bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float float_of_key(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Over a warp, in one instruction that compares integers: the largest, NaN if any is; the smallest of numbers.
__device__ __forceinline__ float largest_of_warp(float value) {
  return float_of_key(__reduce_max_sync(0xffffffffu, order_key(value)));
}
__device__ __forceinline__ float smallest_of_warp(float value) {
  return float_of_key(__reduce_min_sync(0xffffffffu, order_key(value)));
}

}  // namespace fi
