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
struct PrefixRoles : WarpgroupRoles<Config::kConsumers, Config::kProducerRegisters, Config::kConsumerRegisters> {
  using Base = WarpgroupRoles<Config::kConsumers, Config::kProducerRegisters, Config::kConsumerRegisters>;
  static constexpr int kGroups = 1 + Config::kConsumers, kLeastRegisters = 24;
  // Those that have decode's warps, or only the producer.
  static constexpr int kFirst = Config::kDecodeNumWarps > 4 ? (Config::kDecodeNumWarps + 3) / 4 : 1;
  static constexpr int kShare = (Base::kRegisters * kGroups - kLeastRegisters * (kGroups - kFirst)) / kFirst / 8 * 8;
  static constexpr int kFirstRegisters = kShare < 256 ? kShare : 256;
  static_assert(kFirst <= kGroups && kFirstRegisters >= Config::kConsumerRegisters);
};

template <class Config>
__device__ __forceinline__ PrefillShared<Config>& list_memory() {
  using Shared = PrefillShared<Config>;
  extern __shared__ __align__(128) unsigned char unaligned[];
  static_assert(sizeof(Shared) + 1024 <= Config::kSharedBytes);
  return *reinterpret_cast<Shared*>(unaligned + (-ptx::shared_address(unaligned) & 1023u));
}

template <class Params>
__device__ __forceinline__ int num_rows_of(const Params& params) {
  return static_cast<const PrefixHeader*>(params.header)->num_rows;
}

// By the first warpgroups: the decode kernel's work where there is no list, which then ends them. All is asked for before it is
// known whether there is one, so that a block begins no later than one of the decode kernel. `maps`: none, or those of K and V.
template <class Config, class Params, class... Maps>
__device__ __forceinline__ void attend_without_list(const Params& params, const Maps&... maps) {
  using Decode = DecodeConfig<Config>;
  static_assert(DecodeShared<Decode>::kBytes <= Config::kSharedBytes);
  constexpr int kSign = 1 << 31;
  if (threadIdx.x == 0) (ptx::prefetch_tensor_map(&maps), ...);
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();
  const int num_rows = num_rows_of(params);
  const DecodeStart start(params);
  ptx::take_registers<PrefixRoles<Config>::kFirstRegisters>();
  const DecodeBarriers<Decode> barriers(decode_memory<Decode>());
  const bool decodes = threadIdx.x < Decode::kNumThreads;
  if (decodes) barriers.init(loader_of<Decode>(params, maps...).kArrivals);
  if ((num_rows | (start.begin & kSign)) == 0) {  // asks for both, so that neither is fetched after the other
    if (decodes) decode_items<Decode>(params, start, maps...);
    ptx::end_thread();  // and no return: so this code, the shorter work's, lies before the other
  }
  if (decodes) barriers.invalidate();
}

// By the other warpgroups: ends them where there is no list. One thread is of use before: it brings the page table's entries of
// what the block attends to first, while decode's warps are still on their way to it.
template <class Config, class Params>
__device__ __forceinline__ void end_without_list(const Params& params) {
  const WorkerStart& start = static_cast<const WorkerStart*>(params.starts)[blockIdx.x];
  const bool brings = Config::kTable == kDense && threadIdx.x == Config::kNumThreads - kWarpThreads;
  int num_items = 0, request = 0, position = 0;
  if (brings) {
    num_items = start.end - start.begin;
    request = start.first.request;
    position = start.first.kv_begin;
  }
  if (num_rows_of(params) != 0) return;
  if (brings && num_items > 0) {
    ptx::prefetch_to_l2(dense_entries<Config>(params, request) + static_cast<unsigned>(position) / Config::kPageSize);
  }
  ptx::end_thread();
}

// By the first warpgroup: makes the rings and brings what the list's tiles need. `maps`: none, or those of K and V.
template <class Config, class Params, class... Maps>
__device__ __forceinline__ void bring_list(const Params& params, const ptx::TensorMap& queries, const Maps&... maps) {
  using Shared = PrefillShared<Config>;
  using Copies = decltype(copies_of<Config>(params, maps...));
  Shared& shared = list_memory<Config>();
  ptx::give_registers<Config::kProducerRegisters>();
  __syncthreads();  // nobody has barriers there any more
  if (threadIdx.x == 0) shared.template init<Copies>(Shared::kRecordLanes);
  __syncthreads();
  if (warp_idx() < Copies::kWarps) {
    PrefixLoader<Config, Params, Copies>(params, queries, copies_of<Config>(params, maps...), shared).run();
  }
}

// `maps`: none, or those of K and V, and then the decode kernel's.
template <class Config, class Params, class... Maps>
__device__ __forceinline__ void attention_prefix(const Params& params, const ptx::TensorMap& queries, const Maps&... maps) {
  using Roles = PrefixRoles<Config>;
  const ptx::TensorMap* const all[] = {&queries, &maps...};
  if (warpgroup_idx() / Roles::kFirst != 0) {  // compared so, this little lies before the others' code
    ptx::give_registers<Roles::kLeastRegisters>();
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    if constexpr (Config::kDecodeNumWarps > 0) {
      end_without_list<Config>(params);
    } else {
      if (num_rows_of(params) == 0) ptx::end_thread();
    }
  } else {
    if constexpr (Config::kDecodeBoxes) {
      attend_without_list<Config>(params, *all[3], *all[4]);
    } else if constexpr (Config::kDecodeNumWarps > 0) {
      attend_without_list<Config>(params);
    } else {
      ptx::wait_for_previous_kernel();
      ptx::allow_next_kernel();
      if (num_rows_of(params) == 0) ptx::end_thread();
    }
    if (Roles::kFirst == 1 || warpgroup_idx() == 0) {
      if constexpr (Config::kBoxes) bring_list<Config>(params, queries, *all[1], *all[2]);
      else bring_list<Config>(params, queries);
      ptx::end_thread_unseen();  // so that this code lies before the consumers', who wait for what it brings
    }
    if constexpr (Roles::kFirst > 1) ptx::give_registers<Config::kConsumerRegisters>();
  }
  __syncthreads();
  __syncthreads();
  ptx::take_registers<Config::kConsumerRegisters>();
  PrefillConsumer<Config, Params, PrefixStore<Config, Params>>(params, list_memory<Config>(), warpgroup_idx() - 1).run();
  PrefixMerger<Config, Params>(params, static_cast<int>(threadIdx.x) - kWarpgroupThreads).run();
}

}  // namespace fi
