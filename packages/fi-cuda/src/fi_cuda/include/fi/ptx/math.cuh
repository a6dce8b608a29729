// Functions of the special function unit; subnormals are zero except for tanh. Errors are the documented maxima.
// PTX ISA, section "Floating Point Instructions: ex2, lg2, tanh, rcp".
#pragma once

namespace fi::ptx {

// 2^x within 2 ulp: 0 for -inf, 1 for 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// log2 x, within 2^-22 near 1 and a relative 2^-22 elsewhere; -inf for 0.
__device__ __forceinline__ float log2_approx(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// tanh x within a relative 2^-11.
__device__ __forceinline__ float tanh_approx(float x) {
  float result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x within 1 ulp; infinity for 0, 0 for infinity.
__device__ __forceinline__ float rcp_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The larger; NaN if either is. sm_80.
__device__ __forceinline__ float max_or_nan(float first, float second) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(first), "f"(second));
  return result;
}

}  // namespace fi::ptx
