// One block's copies by the copy engine: bytes to bytes, and a box of a 3-D tensor to registers and, negated, to a box of
// another, elsewhere.
#pragma once

#include "fi/ptx/bulk_copy.cuh"
#include "fi/ptx/fence.cuh"
#include "fi/ptx/l2_policy.cuh"
#include "fi/ptx/mbarrier.cuh"
#include "fi/ptx/tma.cuh"
#include "fi/tile/swizzle.cuh"

namespace fi {

template <class Config, class Params>
__device__ __forceinline__ void copy_engine(const Params& params, const ptx::TensorMap& from, const ptx::TensorMap& to) {
  constexpr int kColumns = Config::kSwizzleBytes / 2;
  constexpr int kSize = Config::kRows * kColumns;
  __shared__ alignas(1024) unsigned short tile[kSize];
  __shared__ alignas(16) unsigned char bytes[Config::kBytes];
  __shared__ unsigned long long barrier;
  const int plane = blockIdx.x;
  if (threadIdx.x == 0) {
    ptx::init_barrier(&barrier, 1);
    ptx::fence_barrier_init();
    ptx::arrive_and_expect_bytes(&barrier, Config::kBytes + 2 * kSize);
    ptx::bulk_load(bytes, static_cast<const unsigned char*>(params.source) + plane * Config::kBytes, Config::kBytes, &barrier,
                   ptx::evict_first_policy());
    ptx::tma_load_3d(tile, &from, &barrier, params.load_column, params.load_row, plane, ptx::evict_last_policy());
  }
  __syncthreads();
  ptx::wait_barrier(&barrier, 0);
  for (int idx = threadIdx.x; idx < kSize; idx += Config::kNumThreads) {
    unsigned short& value = tile[swizzled_place<Config::kSwizzleBytes, Config::kRows>(idx / kColumns, idx % kColumns * 2) / 2];
    static_cast<unsigned short*>(params.plain)[plane * kSize + idx] = value;
    value ^= 0x8000;
  }
  ptx::fence_proxy_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store_3d(&to, tile, params.store_column, params.store_row, plane);
    ptx::bulk_store(static_cast<unsigned char*>(params.target) + plane * Config::kBytes, bytes, Config::kBytes);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

}  // namespace fi
