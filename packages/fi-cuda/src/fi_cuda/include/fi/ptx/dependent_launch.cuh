// Programmatic dependent launch: overlap of a kernel's start with the end of the one before it in the stream.
// PTX ISA 8.x, section "Parallel Synchronization and Communication Instructions: griddepcontrol".
#pragma once

namespace fi::ptx {

// Blocks until the kernel before this one has ended and its writes are visible. Needed before the first read of anything
// that kernel may have written, and before the first write to anything it may still read. No effect without the launch
// attribute.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks be scheduled once every block of this one has called it or ended.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace fi::ptx
