// What L2 keeps: policies for the copies of bulk_copy.cuh and tma.cuh. sm_80.
// PTX ISA, section "Data Movement and Conversion Instructions: createpolicy".
#pragma once

namespace fi::ptx {

// For bytes that are read once: they leave first.
__device__ __forceinline__ unsigned long long evict_first_policy() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// For bytes that other blocks read again: they leave last.
__device__ __forceinline__ unsigned long long evict_last_policy() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

}  // namespace fi::ptx
