// Words in global memory that blocks of the GPU exchange while they run, without any order among them: each is old or new.
// PTX ISA, sections "Data Movement and Conversion Instructions: ld, st, prefetch" and "Memory Consistency Model".
#pragma once

namespace fi::ptx {

// One word of 64 bits, or two or four of 32, aligned to as many; each for itself is old or new.
__device__ __forceinline__ float2 load_relaxed(const float2* from) {
  float2 values;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];"
               : "=f"(values.x), "=f"(values.y)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return values;
}

__device__ __forceinline__ float4 load_relaxed(const float4* from) {
  float4 values;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values.x), "=f"(values.y), "=f"(values.z), "=f"(values.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return values;
}

__device__ __forceinline__ unsigned long long load_relaxed(const unsigned long long* from) {
  unsigned long long value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(__cvta_generic_to_global(from)) : "memory");
  return value;
}

__device__ __forceinline__ void store_relaxed(float2* to, float2 values) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "f"(values.x), "f"(values.y)
               : "memory");
}

__device__ __forceinline__ void store_relaxed(float4* to, float4 values) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(values.x),
               "f"(values.y), "f"(values.z), "f"(values.w)
               : "memory");
}

// Brings a line into L2, without waiting for it.
__device__ __forceinline__ void prefetch_to_l2(const void* line) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(line)) : "memory");
}

}  // namespace fi::ptx
