// A warp's loads and stores of 8x8 matrices of 16-bit elements between shared memory and mma fragments. Lane l names the
// 16-byte row l % 8 of matrix l / 8 (lanes beyond the matrices name nothing); afterwards it holds elements 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4 of each matrix, or of column l / 4 with _trans.
// PTX ISA, section "Warp Level Matrix Instructions: ldmatrix, stmatrix".
#pragma once

#include "fi/ptx/shared_address.cuh"

namespace fi::ptx {

#define FI_LOAD(NAME, COUNT, QUALIFIER, REGISTERS, ADDRESS, ...)                                                   \
  __device__ __forceinline__ void NAME(unsigned (&fragment)[COUNT], const void* row) {                             \
    asm volatile("ldmatrix.sync.aligned.m8n8.x" #COUNT QUALIFIER ".shared.b16 {" REGISTERS "}, [" ADDRESS "];"     \
                 : __VA_ARGS__                                                                                     \
                 : "r"(shared_address(row))                                                                        \
                 : "memory");                                                                                      \
  }
#define FI_STORE(NAME, COUNT, QUALIFIER, REGISTERS, ...)                                                           \
  __device__ __forceinline__ void NAME(void* row, const unsigned (&fragment)[COUNT]) {                             \
    asm volatile("stmatrix.sync.aligned.m8n8.x" #COUNT QUALIFIER ".shared.b16 [%0], {" REGISTERS "};" ::"r"(       \
                     shared_address(row)),                                                                         \
                 __VA_ARGS__                                                                                       \
                 : "memory");                                                                                      \
  }
#define FI_BOTH(SUFFIX, QUALIFIER)                                                                                 \
  FI_LOAD(ldmatrix_x1##SUFFIX, 1, QUALIFIER, "%0", "%1", "=r"(fragment[0]))                                        \
  FI_LOAD(ldmatrix_x2##SUFFIX, 2, QUALIFIER, "%0, %1", "%2", "=r"(fragment[0]), "=r"(fragment[1]))                 \
  FI_LOAD(ldmatrix_x4##SUFFIX, 4, QUALIFIER, "%0, %1, %2, %3", "%4", "=r"(fragment[0]), "=r"(fragment[1]),         \
          "=r"(fragment[2]), "=r"(fragment[3]))                                                                    \
  FI_STORE(stmatrix_x1##SUFFIX, 1, QUALIFIER, "%1", "r"(fragment[0]))                                              \
  FI_STORE(stmatrix_x2##SUFFIX, 2, QUALIFIER, "%1, %2", "r"(fragment[0]), "r"(fragment[1]))                        \
  FI_STORE(stmatrix_x4##SUFFIX, 4, QUALIFIER, "%1, %2, %3, %4", "r"(fragment[0]), "r"(fragment[1]),                \
           "r"(fragment[2]), "r"(fragment[3]))
FI_BOTH(, "")
FI_BOTH(_trans, ".trans")
#undef FI_BOTH
#undef FI_STORE
#undef FI_LOAD

// The transpose of an 8x8 matrix of 16-bit elements that a warp holds. PTX ISA, section "movmatrix".
__device__ __forceinline__ unsigned movmatrix_trans(unsigned fragment) {
  unsigned result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(fragment));
  return result;
}

}  // namespace fi::ptx
