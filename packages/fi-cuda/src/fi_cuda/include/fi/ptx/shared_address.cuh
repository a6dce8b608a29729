// Generic pointers as 32-bit shared addresses, which instructions of the .shared state space take.
// PTX ISA, section "Data Movement and Conversion Instructions: cvta".
#pragma once

namespace fi::ptx {

// `pointer` points into this block's shared memory.
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

}  // namespace fi::ptx
