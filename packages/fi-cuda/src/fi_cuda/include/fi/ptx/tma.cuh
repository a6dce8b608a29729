// Copies of boxes of a tensor between global and shared memory by the copy engine, issued by one thread. A map (made on the
// host by fi_cuda.tensor_map) holds the tensor's address, shape, strides, box and swizzle; coordinates are those of the box's
// first element, innermost dim first, the innermost one a multiple of 16 bytes.
//
// Boxes may reach outside. A load begins anywhere, also at negative coordinates, and fills with the map's value. A store drops
// what is past the end, but its coordinates must not be negative: that is an illegal instruction (CUDA C++ Programming Guide,
// section "Tensor Memory Access: Negative indices and out of bounds").
// PTX ISA, section "Data Movement and Conversion Instructions: cp.async.bulk.tensor".
#pragma once

#include "fi/ptx/shared_address.cuh"

namespace fi::ptx {

// The driver's CUtensorMap; a kernel takes it as a `const __grid_constant__` parameter and never copies it.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

// Brings the map into the descriptor cache ahead of its first use.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// For each number of dims:
// - tma_load_Nd: completes the box's bytes (those outside the tensor included) on `barrier`, which must expect them;
// - with a policy of l2_policy.cuh;
// - tma_load_multicast_Nd: to the same place of every block of the cluster whose bit is set in `blocks`, completing on the
//   barrier at the same place in each;
// - tma_store_Nd: part of the thread's current group of stores, see bulk_commit and bulk_wait of bulk_copy.cuh. What
//   ordinary stores wrote to `shared` needs fence_proxy_async by its writers and a barrier first.
#define FI_PARAMETERS_1 int c0
#define FI_PARAMETERS_2 FI_PARAMETERS_1, int c1
#define FI_PARAMETERS_3 FI_PARAMETERS_2, int c2
#define FI_PARAMETERS_4 FI_PARAMETERS_3, int c3
#define FI_PARAMETERS_5 FI_PARAMETERS_4, int c4
#define FI_OPERANDS_1 "r"(c0)
#define FI_OPERANDS_2 FI_OPERANDS_1, "r"(c1)
#define FI_OPERANDS_3 FI_OPERANDS_2, "r"(c2)
#define FI_OPERANDS_4 FI_OPERANDS_3, "r"(c3)
#define FI_OPERANDS_5 FI_OPERANDS_4, "r"(c4)
#define FI_TMA(DIMS, COORDINATES, I0, I1, I2, I3)                                                                         \
  __device__ __forceinline__ void tma_load_##DIMS##d(                                                                     \
      void* shared, const TensorMap* map, unsigned long long* barrier, FI_PARAMETERS_##DIMS) {                            \
    asm volatile("cp.async.bulk.tensor." #DIMS                                                                            \
                 "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%" #I0 "], [%" #I1                          \
                 ", {" COORDINATES "}], [%" #I2 "];" ::FI_OPERANDS_##DIMS,                                                \
                 "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier))                                      \
                 : "memory");                                                                                             \
  }                                                                                                                       \
  __device__ __forceinline__ void tma_load_##DIMS##d(                                                                     \
      void* shared, const TensorMap* map, unsigned long long* barrier, FI_PARAMETERS_##DIMS, unsigned long long policy) { \
    asm volatile("cp.async.bulk.tensor." #DIMS                                                                            \
                 "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%" #I0 "], [%" #I1           \
                 ", {" COORDINATES "}], [%" #I2 "], %" #I3 ";" ::FI_OPERANDS_##DIMS,                                      \
                 "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "l"(policy)                         \
                 : "memory");                                                                                             \
  }                                                                                                                       \
  __device__ __forceinline__ void tma_load_multicast_##DIMS##d(                                                           \
      void* shared, const TensorMap* map, unsigned long long* barrier, FI_PARAMETERS_##DIMS, unsigned short blocks) {     \
    asm volatile("cp.async.bulk.tensor." #DIMS                                                                            \
                 "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%" #I0 "], [%" #I1       \
                 ", {" COORDINATES "}], [%" #I2 "], %" #I3 ";" ::FI_OPERANDS_##DIMS,                                      \
                 "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "h"(blocks)                         \
                 : "memory");                                                                                             \
  }                                                                                                                       \
  __device__ __forceinline__ void tma_store_##DIMS##d(const TensorMap* map, const void* shared, FI_PARAMETERS_##DIMS) {   \
    asm volatile("cp.async.bulk.tensor." #DIMS "d.global.shared::cta.tile.bulk_group [%" #I1 ", {" COORDINATES "}], [%"   \
                 #I0 "];" ::FI_OPERANDS_##DIMS,                                                                           \
                 "r"(shared_address(shared)), "l"(map)                                                                    \
                 : "memory");                                                                                             \
  }
FI_TMA(1, "%0", 1, 2, 3, 4)
FI_TMA(2, "%0, %1", 2, 3, 4, 5)
FI_TMA(3, "%0, %1, %2", 3, 4, 5, 6)
FI_TMA(4, "%0, %1, %2, %3", 4, 5, 6, 7)
FI_TMA(5, "%0, %1, %2, %3, %4", 5, 6, 7, 8)
#undef FI_TMA
#undef FI_PARAMETERS_1
#undef FI_PARAMETERS_2
#undef FI_PARAMETERS_3
#undef FI_PARAMETERS_4
#undef FI_PARAMETERS_5
#undef FI_OPERANDS_1
#undef FI_OPERANDS_2
#undef FI_OPERANDS_3
#undef FI_OPERANDS_4
#undef FI_OPERANDS_5

}  // namespace fi::ptx
