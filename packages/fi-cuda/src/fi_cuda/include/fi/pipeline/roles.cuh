// Who does what in a warp-specialised block: its first warps produce (issue copies), the others consume (compute).
// Between warpgroups registers move from the ones to the others (Shah et al., "FlashAttention-3", 2024, section 3.1).
#pragma once

#include "fi/ptx/elect.cuh"
#include "fi/ptx/registers.cuh"

namespace fi {

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;

// Uniform over the warp also for the compiler, so that branches on them cost no divergence.
__device__ __forceinline__ int warp_idx() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpThreads, 0);
}
__device__ __forceinline__ int warpgroup_idx() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
}

// True in one thread of each warpgroup, the same one each time; whole warps call it together.
__device__ __forceinline__ bool elect_one_of_warpgroup() {
  return warp_idx() % (kWarpgroupThreads / kWarpThreads) == 0 && ptx::elect_one();
}

// A block of kProducers producer and kConsumers consumer warps, with equally many registers.
template <int kProducers, int kConsumers>
struct WarpRoles {
  static constexpr int kNumThreads = (kProducers + kConsumers) * kWarpThreads;

  // Runs produce() in the first warps and consume(idx), idx = 0, 1, ..., in the others. All threads call it.
  template <class Produce, class Consume>
  static __device__ __forceinline__ void run(Produce produce, Consume consume) {
    if (warp_idx() < kProducers) produce();
    else consume(warp_idx() - kProducers);
  }
};

// A block of one producer and kConsumers consumer warpgroups, and the registers of their threads. The kernel's launch
// bounds must name one block a multiprocessor, or the compiler leaves the registers as they are.
template <int kConsumers, int kProducerRegisters, int kConsumerRegisters>
struct WarpgroupRoles {
  static constexpr int kNumThreads = (1 + kConsumers) * kWarpgroupThreads;
  // What a thread has at the start: its share of the 65536, in units of 8.
  static constexpr int kRegisters = 65536 / kNumThreads / 8 * 8;
  static_assert(kProducerRegisters % 8 == 0 && kConsumerRegisters % 8 == 0);
  static_assert(24 <= kProducerRegisters && kProducerRegisters <= kRegisters);
  static_assert(kRegisters <= kConsumerRegisters && kConsumerRegisters <= 256);
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kRegisters);

  // Runs produce() in the first warpgroup and consume(idx), idx = 0, 1, ..., in the others. All threads call it, once.
  template <class Produce, class Consume>
  static __device__ __forceinline__ void run(Produce produce, Consume consume) {
    if (warpgroup_idx() == 0) {
      ptx::give_registers<kProducerRegisters>();
      produce();
    } else {
      ptx::take_registers<kConsumerRegisters>();
      consume(warpgroup_idx() - 1);
    }
  }
};

}  // namespace fi
