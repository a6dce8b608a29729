// One lane of a warp to issue copies. PTX ISA, section "Parallel Synchronization and Communication Instructions: elect.sync".
#pragma once

namespace fi::ptx {

// True in one lane, the same one each time; all 32 lanes of the warp call it together.
__device__ __forceinline__ bool elect_one() {
  unsigned elected;
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, elected;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

}  // namespace fi::ptx
