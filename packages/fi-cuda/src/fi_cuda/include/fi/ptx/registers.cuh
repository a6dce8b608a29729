// Moving registers between warpgroups. kRegisters a thread: a multiple of 8 from 24 to 256. All warps of a warpgroup call
// it; the kernel needs a register cap at entry (launch bounds with a number of blocks), or the compiler ignores it.
// PTX ISA, section "Miscellaneous Instructions: setmaxnreg".
#pragma once

namespace fi::ptx {

// Returns what the thread has above kRegisters to the block's pool.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Takes registers from the pool up to kRegisters; waits until there are enough.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace fi::ptx
