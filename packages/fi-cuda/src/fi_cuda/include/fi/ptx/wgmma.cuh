// A warpgroup's product of matrices, asynchronous: accumulator [64, kN] (+)= A [64, K] B [K, kN] with A in shared memory or
// registers, B in shared memory, sums in float32. K is 32 bytes: 16 elements of 16 bits, 32 of 8 bits.
//
// Order: wgmma_fence, some wgmma_*, wgmma_commit; wgmma_wait before the accumulators or register operands are touched or
// shared operands overwritten. All 128 threads of the warpgroup (warps 4 i to 4 i + 3) call together.
//
// PTX ISA, section "Asynchronous Warpgroup Level Matrix Instructions"; who holds which element is in fi/tile/fragments.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "fi/ptx/shared_address.cuh"
#include "fi/ptx/wgmma_descriptor.cuh"
#include "fi/ptx/wgmma_shapes.cuh"

namespace fi::ptx {

// Before the first wgmma and after other instructions wrote accumulators or register operands.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of wgmma since the last call.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Returns once at most kGroups of the latest groups are not yet complete.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// No instruction: keeps the compiler from moving reads and writes of the values across this point. After wgmma_wait and
// before wgmma_fence on accumulators that a group in flight writes.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&values)[kCount]) {
#pragma unroll
  for (int idx = 0; idx < kCount; ++idx) asm volatile("" : "+f"(values[idx])::"memory");
}

template <int kCount>
__device__ __forceinline__ void pin_registers(unsigned (&values)[kCount]) {
#pragma unroll
  for (int idx = 0; idx < kCount; ++idx) asm volatile("" : "+r"(values[idx])::"memory");
}

// The instruction's K and types, and whether it has the major-ness operands, which only 16-bit types have.
template <class T>
struct WgmmaType;
template <>
struct WgmmaType<__half> {
  static constexpr char kText[] = "k16.f32.f16.f16";
  static constexpr bool kHasMajor = true;
};
template <>
struct WgmmaType<__nv_bfloat16> {
  static constexpr char kText[] = "k16.f32.bf16.bf16";
  static constexpr bool kHasMajor = true;
};
template <>
struct WgmmaType<__nv_fp8_e4m3> {
  static constexpr char kText[] = "k32.f32.e4m3.e4m3";
  static constexpr bool kHasMajor = false;
};
template <>
struct WgmmaType<__nv_fp8_e5m2> {
  static constexpr char kText[] = "k32.f32.e5m2.e5m2";
  static constexpr bool kHasMajor = false;
};

// The immediate operands after the predicate: signs, then the major-ness of the operands in shared memory.
template <bool kHasMajor, bool kHasA, Major kMajorA, Major kMajorB>
struct WgmmaImmediates {
  static constexpr char kText[] = {
      '1', ',', '1', kHasMajor ? ',' : ' ',
      kHasMajor ? ((kHasA ? kMajorA : kMajorB) == Major::kMN ? '1' : '0') : ' ',
      kHasMajor && kHasA ? ',' : ' ',
      kHasMajor && kHasA ? (kMajorB == Major::kMN ? '1' : '0') : ' ', '\0'};
};

#define FI_WGMMA_TEXT(N, KIND, A, B, ACCUMULATE, IMMEDIATES)                                            \
  "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #ACCUMULATE                                    \
  ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "%" #KIND " {" FI_WGMMA_TEXT_##N "}, " A ", %" #B        \
  ", accumulate, %" #IMMEDIATES ";\n}"

// A and B in shared memory, as descriptors of wgmma_descriptor.cuh. Without `accumulate` the old values do not count.
template <class T, int kN, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
__device__ __forceinline__ void wgmma_ss(float (&accumulator)[kN / 2], unsigned long long a, unsigned long long b,
                                         bool accumulate) {
  using Type = WgmmaType<T>;
  using Immediates = WgmmaImmediates<Type::kHasMajor, true, kMajorA, kMajorB>;
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256);
  static_assert(Type::kHasMajor || (kMajorA == Major::kK && kMajorB == Major::kK), "8-bit operands are K-major");
#define FI_WGMMA_CASE(N, I0, I1, I2, I3, I4, I5, I6, I7)                              \
  if constexpr (kN == N)                                                              \
    asm volatile(FI_WGMMA_TEXT(N, I3, "%" #I0, I1, I2, I4)                            \
                 : FI_WGMMA_LIST_##N(accumulator)                                     \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "C"(Type::kText), "C"(Immediates::kText));
  FI_WGMMA_SHAPES(FI_WGMMA_CASE)
#undef FI_WGMMA_CASE
}

// A in registers, B in shared memory. Registers of `a` may be overwritten after wgmma_wait only.
template <class T, int kN, Major kMajorB = Major::kK>
__device__ __forceinline__ void wgmma_rs(float (&accumulator)[kN / 2], const unsigned (&a)[4], unsigned long long b,
                                         bool accumulate) {
  using Type = WgmmaType<T>;
  using Immediates = WgmmaImmediates<Type::kHasMajor, false, Major::kK, kMajorB>;
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256);
  static_assert(Type::kHasMajor || kMajorB == Major::kK, "8-bit operands are K-major");
#define FI_WGMMA_CASE(N, I0, I1, I2, I3, I4, I5, I6, I7)                                                  \
  if constexpr (kN == N)                                                                                  \
    asm volatile(FI_WGMMA_TEXT(N, I6, "{%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}", I4, I5, I7)             \
                 : FI_WGMMA_LIST_##N(accumulator)                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
                   "C"(Type::kText), "C"(Immediates::kText));
  FI_WGMMA_SHAPES(FI_WGMMA_CASE)
#undef FI_WGMMA_CASE
}

#undef FI_WGMMA_TEXT

}  // namespace fi::ptx
