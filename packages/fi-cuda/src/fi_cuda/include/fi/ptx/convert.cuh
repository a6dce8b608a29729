// Conversions of several numbers at once. PTX ISA, section "Data Movement and Conversion Instructions: cvt".
#pragma once

namespace fi::ptx {

// Four 8-bit floats as float16, exactly, the lowest first. Halves of a register need no shift so.
__device__ __forceinline__ void halves_of_e4m3(unsigned& low, unsigned& high, unsigned bytes) {
  asm("{\n.reg .b16 first, second;\nmov.b32 {first, second}, %2;\ncvt.rn.f16x2.e4m3x2 %0, first;\n"
      "cvt.rn.f16x2.e4m3x2 %1, second;\n}"
      : "=r"(low), "=r"(high)
      : "r"(bytes));
}

__device__ __forceinline__ void halves_of_e5m2(unsigned& low, unsigned& high, unsigned bytes) {
  asm("{\n.reg .b16 first, second;\nmov.b32 {first, second}, %2;\ncvt.rn.f16x2.e5m2x2 %0, first;\n"
      "cvt.rn.f16x2.e5m2x2 %1, second;\n}"
      : "=r"(low), "=r"(high)
      : "r"(bytes));
}

// Four floats as e4m3, to nearest even and saturated, the first in the lowest byte. sm_89.
__device__ __forceinline__ unsigned e4m3x4_of(float first, float second, float third, float fourth) {
  unsigned result;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n"
      "}"
      : "=r"(result)
      : "f"(first), "f"(second), "f"(third), "f"(fourth));
  return result;
}

}  // namespace fi::ptx
