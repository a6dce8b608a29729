// Attention of a batch whose requests share prefixes, in one launch: keys of a prefix are read once for all who share them.
//
// One block a multiprocessor takes tiles from the list of attention_prefix_plan.cuh: stretches of a node's keys under rows of
// all its members, bound by products, and of requests' own keys, bound by memory, side by side. Copies, products and softmax are
// those of attention_prefill.cuh. Rows with several parts are merged when every block has done its tiles; the launch is
// cooperative. A batch that has no list, as it is through sooner if each request reads its keys alone, is served by the decode
// kernel's code within the same launch. Sources: Juravsky et al., "Hydragen", 2024 (rows of all members against shared keys); Ye
// et al., "Cascade Inference", 2024 (levels, merged by their log-sum-exps); "stream-K" (Osama et al., 2023).
// Config: as attention_prefill.cuh, with kLevels; of the decode kernel kDecodeNumWarps (0: it is not there), kDecodeRowWarps, kDecodeHeadWarps,
// kDecodeRows, kDecodeChunkTokens, kDecodeStages, kDecodeBoxes. Params: those of fi_cuda.kernels.attention.prefix.
#pragma once

#include "fi/attention/prefill_consume.cuh"
#include "fi/attention/prefix_load.cuh"
#include "fi/attention/prefix_store.cuh"
#include "fi/kernels/attention_decode.cuh"
#include "fi/ptx/dependent_launch.cuh"
#include "fi/ptx/exit.cuh"
#include "fi/ptx/relaxed.cuh"

namespace fi {

// That of attention_decode.cuh.
template <class Config>
struct DecodeConfig : Config {
  static constexpr int kNumWarps = Config::kDecodeNumWarps, kNumThreads = kNumWarps * kWarpThreads;
  static constexpr int kRowWarps = Config::kDecodeRowWarps, kHeadWarps = Config::kDecodeHeadWarps;
  static constexpr int kRows = Config::kDecodeRows, kStages = Config::kDecodeStages;
  static constexpr int kChunkTokens = Config::kDecodeChunkTokens;
  static constexpr bool kBoxes = Config::kDecodeBoxes;
  static constexpr bool kRopeKeys = false, kBatchInvariant = false;
};

template <class Config>
using PrefixRoles = WarpgroupRoles<Config::kConsumers, Config::kProducerRegisters, Config::kConsumerRegisters>;

// The kernel's work if there is a list. `maps`: none, or those of K and V.
template <class Config, class Params, class... Maps>
__device__ __forceinline__ void attend_to_list(const Params& params, const ptx::TensorMap& queries, const Maps&... maps) {
  using Shared = PrefillShared<Config>;
  using Copies = decltype(copies_of<Config>(params, maps...));
  extern __shared__ __align__(128) unsigned char unaligned[];
  Shared& shared = *reinterpret_cast<Shared*>(unaligned + (-ptx::shared_address(unaligned) & 1023u));
  static_assert(sizeof(Shared) + 1024 <= Config::kSharedBytes);
  if (threadIdx.x == 0) shared.template init<Copies>(Shared::kRecordLanes);
  __syncthreads();
  if (warpgroup_idx() == 0) {
    ptx::give_registers<Config::kProducerRegisters>();
    if (warp_idx() < Copies::kWarps) {
      PrefixLoader<Config, Params, Copies>(params, queries, copies_of<Config>(params, maps...), shared).run();
    }
    ptx::end_thread();  // so that this code lies before the consumers', who wait for what it brings
  }
  ptx::take_registers<Config::kConsumerRegisters>();
  PrefillConsumer<Config, Params, PrefixStore<Config, Params>>(params, shared, warpgroup_idx() - 1).run();
  PrefixMerger<Config, Params>(params, static_cast<int>(threadIdx.x) - kWarpgroupThreads).run();
}

// The decode kernel's, by as many warps as it has; the others' registers are theirs.
template <class Config, class Params, class... Maps>
__device__ __forceinline__ void attend_unshared(const Params& params, const DecodeStart& start, const Maps&... maps) {
  using Decode = DecodeConfig<Config>;
  using Roles = PrefixRoles<Config>;
  constexpr int kLeast = 24, kGroups = (Decode::kNumThreads + kWarpgroupThreads - 1) / kWarpgroupThreads;
  constexpr int kShare = (Roles::kRegisters * (1 + Config::kConsumers) - kLeast * (1 + Config::kConsumers - kGroups)) / kGroups / 8 * 8;
  static_assert(kGroups <= 1 + Config::kConsumers && DecodeShared<Decode>::kBytes <= Config::kSharedBytes);
  if (warpgroup_idx() < kGroups) {
    ptx::take_registers<(kShare < 256 ? kShare : 256)>();
    if (threadIdx.x < Decode::kNumThreads) decode_items<Decode>(params, start, maps...);
  } else {
    ptx::give_registers<kLeast>();
  }
}

// Has the decode kernel's code serve a batch without a list, and then ends the kernel.
template <class Config, class Params, class... Maps>
__device__ __forceinline__ void attend_without_list(const Params& params, const Maps&... maps) {
  using Decode = DecodeConfig<Config>;
  constexpr int kSign = 1 << 31;
  // Both are on their way while the barriers are made.
  const int num_rows = static_cast<const PrefixHeader*>(params.header)->num_rows;
  const DecodeStart start(params);
  const DecodeBarriers<Decode> barriers(decode_memory<Decode>());
  const bool decodes = threadIdx.x < Decode::kNumThreads;
  if (decodes) barriers.init(loader_of<Decode>(params, maps...).kArrivals);
  if ((num_rows | (start.begin & kSign)) == 0) {  // asks for both, so that neither is fetched after the other
    attend_unshared<Config>(params, start, maps...);
    ptx::end_thread();  // and no return: so this code, the shorter work's, lies before the other
  }
  if (decodes) barriers.invalidate();
  __syncthreads();
}

// `maps`: none, or those of K and V, and then the decode kernel's.
template <class Config, class Params, class... Maps>
__device__ __forceinline__ void attention_prefix(const Params& params, const ptx::TensorMap& queries, const Maps&... maps) {
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&queries);
    (ptx::prefetch_tensor_map(&maps), ...);
  }
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();
  const ptx::TensorMap* const all[] = {&queries, &maps...};
  // What the block reads first is on its way while it is asked which of it is needed.
  if (threadIdx.x == 0) ptx::prefetch_to_l2(static_cast<const AttentionItem*>(params.rows) + blockIdx.x / params.num_kv_heads);
  if constexpr (Config::kDecodeBoxes) {
    attend_without_list<Config>(params, *all[3], *all[4]);
  } else if constexpr (Config::kDecodeNumWarps > 0) {
    attend_without_list<Config>(params);
  } else if (static_cast<const PrefixHeader*>(params.header)->num_rows == 0) {
    return;
  }
  if constexpr (Config::kBoxes) attend_to_list<Config>(params, queries, *all[1], *all[2]);
  else attend_to_list<Config>(params, queries);
}

}  // namespace fi
