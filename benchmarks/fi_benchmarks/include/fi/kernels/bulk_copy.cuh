// A copy of contiguous memory through shared memory, bulk loads in and bulk stores out: a ceiling of what reads and writes.
//
// One thread a block does everything; its pieces lie a grid apart. A stage is loaded again when its store has read it,
// one step late, so that a store is always in flight.
// Config: kStages, kStageBytes, kNumThreads.
// Params: source, target; num_bytes, a multiple of 16; piece_bytes, a multiple of 16 up to kStageBytes.
#pragma once

#include "fi/ptx/bulk_copy.cuh"
#include "fi/ptx/dependent_launch.cuh"
#include "fi/ptx/mbarrier.cuh"
#include "fi/tile/rows.cuh"

namespace fi {

template <class Config, class Params>
__device__ __forceinline__ void bulk_copy(const Params& params) {
  constexpr int kStages = Config::kStages;
  extern __shared__ __align__(128) char ring[];
  __shared__ __align__(8) unsigned long long full[kStages];
  if (threadIdx.x != 0) return;
  for (int idx = 0; idx < kStages; ++idx) ptx::init_barrier(&full[idx], 1);
  ptx::fence_barrier_init();
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();

  const char* source = static_cast<const char*>(params.source);
  char* target = static_cast<char*>(params.target);
  const int64 step = static_cast<int64>(gridDim.x) * params.piece_bytes;
  const int64 begin = static_cast<int64>(blockIdx.x) * params.piece_bytes;
  const int num_pieces = begin < params.num_bytes ? static_cast<int>((params.num_bytes - begin + step - 1) / step) : 0;
  const auto bytes_of = [&](int idx) {
    return static_cast<unsigned>(min(static_cast<int64>(params.piece_bytes), params.num_bytes - begin - idx * step));
  };
  const auto load = [&](int idx) {
    const int stage = idx % kStages;
    ptx::arrive_and_expect_bytes(&full[stage], bytes_of(idx));
    ptx::bulk_load(ring + stage * Config::kStageBytes, source + begin + idx * step, bytes_of(idx), &full[stage]);
  };

  for (int idx = 0; idx < min(num_pieces, kStages); ++idx) load(idx);
  for (int idx = 0; idx < num_pieces; ++idx) {
    const int stage = idx % kStages;
    ptx::wait_barrier(&full[stage], (idx / kStages) & 1);
    ptx::bulk_store(target + begin + idx * step, ring + stage * Config::kStageBytes, bytes_of(idx));
    ptx::bulk_commit();
    const int next = idx - 1 + kStages;
    if (idx > 0 && next < num_pieces) {
      ptx::bulk_wait_read<1>();  // the store before this one has left its stage
      load(next);
    }
  }
  ptx::bulk_wait<0>();
}

}  // namespace fi
