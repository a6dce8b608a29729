// Ending a thread in the middle of a kernel.
// PTX ISA, section "Control Flow Instructions: exit".
#pragma once

namespace fi::ptx {

// Ends the calling thread. To the compiler what follows may still run, so that it lays out what comes before as the way there.
__device__ __forceinline__ void end_thread() { asm volatile("exit;" ::: "memory"); }

// The same to the assembler too, which would take code that nothing leads to for another place: it ends where the grid has blocks.
__device__ __forceinline__ void end_thread_unseen() {
  asm volatile(
      "{ .reg .pred p; .reg .u32 blocks; mov.u32 blocks, %nctaid.x; setp.ne.u32 p, blocks, 0; @p exit; }" ::: "memory");
}

}  // namespace fi::ptx
