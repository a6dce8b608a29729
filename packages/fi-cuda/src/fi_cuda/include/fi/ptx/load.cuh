// Loads that say what caches keep. PTX ISA, section "Data Movement and Conversion Instructions: ld".
#pragma once

namespace fi::ptx {

// Leaves L1 to what is read again.
__device__ __forceinline__ uint4 load_past_l1(const void* address) {
  uint4 bits;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(__cvta_generic_to_global(address)));
  return bits;
}

}  // namespace fi::ptx
