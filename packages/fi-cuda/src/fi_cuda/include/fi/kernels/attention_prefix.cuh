// Attention of a batch whose requests share prefixes, in one launch: keys of a prefix are read once for all who share them.
//
// One block a multiprocessor takes tiles from the list of attention_prefix_plan.cuh: stretches of a node's keys under rows of
// all its members, bound by products, and of requests' own keys, bound by memory, side by side. Copies, products and softmax are
// those of attention_prefill.cuh. Rows with several parts are merged when every block has done its tiles; the launch is
// cooperative. Sources: Juravsky et al., "Hydragen", 2024 (rows of all members against shared keys); Ye et al., "Cascade
// Inference", 2024 (levels, merged by their log-sum-exps); "stream-K" (Osama et al., 2023).
// Config: as attention_prefill.cuh, with kLevels. Params: those of fi_cuda.kernels.attention.prefix.
#pragma once

#include "fi/attention/prefill_consume.cuh"
#include "fi/attention/prefix_load.cuh"
#include "fi/attention/prefix_store.cuh"
#include "fi/ptx/dependent_launch.cuh"
#include "fi/ptx/relaxed.cuh"

namespace fi {

// `maps`: none, or those of K and V.
template <class Config, class Params, class... Maps>
__device__ __forceinline__ void attention_prefix(const Params& params, const ptx::TensorMap& queries, const Maps&... maps) {
  using Shared = PrefillShared<Config>;
  using Roles = WarpgroupRoles<Config::kConsumers, Config::kProducerRegisters, Config::kConsumerRegisters>;
  extern __shared__ __align__(128) unsigned char unaligned[];
  Shared& shared = *reinterpret_cast<Shared*>(unaligned + (-ptx::shared_address(unaligned) & 1023u));
  static_assert(Config::kCluster == 1);
  static_assert(sizeof(Shared) + 1024 <= Config::kSharedBytes);
  using Copies = decltype(copies_of<Config>(params, maps...));
  if (threadIdx.x == 0) {
    shared.template init<Copies>(Shared::kRecordLanes);
    ptx::prefetch_tensor_map(&queries);
    (ptx::prefetch_tensor_map(&maps), ...);
  }
  __syncthreads();
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();
  // The block's first tile is on its way while it is asked whether there is any.
  if (threadIdx.x == 0) {
    ptx::prefetch_to_l2(static_cast<const AttentionItem*>(params.rows) + blockIdx.x / params.num_kv_heads);
  }
  if (static_cast<const PrefixHeader*>(params.header)->num_rows == 0) return;
  Roles::run(
      [&] {
        if (warp_idx() < Copies::kWarps) {
          PrefixLoader<Config, Params, Copies>(params, queries, copies_of<Config>(params, maps...), shared).run();
        }
      },
      [&](int warpgroup) {
        PrefillConsumer<Config, Params, PrefixStore<Config, Params>>(params, shared, warpgroup).run();
        PrefixMerger<Config, Params>(params, static_cast<int>(threadIdx.x) - kWarpgroupThreads).run();
      });
}

}  // namespace fi
