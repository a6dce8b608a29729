// A warp's product of matrices in registers. PTX ISA, section "Warp Level Matrix Instructions: mma"; who holds which element
// is in fi/tile/fragments.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fi::ptx {

// PTX's name of an element type.
template <class T>
struct TypeName;
template <>
struct TypeName<__half> {
  static constexpr char kText[] = "f16";
};
template <>
struct TypeName<__nv_bfloat16> {
  static constexpr char kText[] = "bf16";
};

// accumulator [16, 8] += a [16, 16] b [16, 8], products exact, sums in float32; T is __half or __nv_bfloat16. sm_80.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&accumulator)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.%10.%10.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "C"(TypeName<T>::kText));
}

}  // namespace fi::ptx
