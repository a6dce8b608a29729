// Ending a thread in the middle of a kernel.
// PTX ISA, section "Control Flow Instructions: exit".
#pragma once

namespace fi::ptx {

// Ends the calling thread. To the compiler what follows may still run, so that it lays out what comes before as the way there.
__device__ __forceinline__ void end_thread() { asm volatile("exit;" ::: "memory"); }

}  // namespace fi::ptx
