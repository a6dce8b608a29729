// Attention of long queries on Hopper, bound by its matrix products.
//
// One block a multiprocessor works through its worker's items of the plan. One warp copies queries, keys and values into rings
// by tensor maps; each of the other warpgroups has 64 packed query rows of an item. Sources: Shah et al., "FlashAttention-3",
// 2024, section 3 (roles, overlap within and between warpgroups); "stream-K" (Osama et al., 2023) for equal shares.
// Config: Dtype (out), Query (Q), Stored (K, V), kBoxes (K and V through tensor maps), kHeadDim, kHeadDimVo, kGroupSize, kPageSize (0:
// ragged), kTable, kTableRow, kConsumers (warpgroups), kTokens (keys a step), kEdgeTokens (unit of the keys of a first step),
// kBoxTokens, kKeyStages, kValueStages, kQueryStages, kLandingStages, kPingPong, kOverlap, kCopyOrder, kInPieces (of tiles, in the order), kParts (of a step's weights), kCausal, kWindowed, kSoftCap, kAlibi,
// kSinks, kMask, kRotaryDim, kRopePairs, kQScales, kKScales, kVScales, kLse, kSignedScale (the softmax scale may be 0 or less),
// kProducerRegisters, kConsumerRegisters, kSharedBytes, kDenseTiles (prefill_dense.cuh), kAfterDecode (it follows the decode kernel, which serves batches of short
// queries). Params: those of
// fi_cuda.kernels.attention.prefill.
#pragma once

#include "fi/attention/prefill_consume.cuh"
#include "fi/attention/prefill_load.cuh"
#include "fi/ptx/dependent_launch.cuh"

namespace fi {

// Whether the decode kernel, which is the one before in the stream, serves this batch. It has waited for all kernels before it, the
// planner's among them, so that the head of the list may be read without waiting for its end.
template <class Config, class Params>
__device__ __forceinline__ bool is_left_to_decode(const Params& params) {
  if constexpr (!Config::kAfterDecode) return false;
  const OrderHeader* order = static_cast<const OrderHeader*>(params.order);
  return order->is_used && order->num_rows == 0;
}

// `maps`: none, or those of K and V.
template <class Config, class Params, class... Maps>
__device__ __forceinline__ void attention_prefill(const Params& params, const ptx::TensorMap& queries, const Maps&... maps) {
  using Shared = PrefillShared<Config>;
  using Roles = WarpgroupRoles<Config::kConsumers, Config::kProducerRegisters, Config::kConsumerRegisters>;
  extern __shared__ __align__(128) unsigned char unaligned[];
  Shared& shared = *reinterpret_cast<Shared*>(unaligned + (-ptx::shared_address(unaligned) & 1023u));
  static_assert(sizeof(Shared) + 1024 <= Config::kSharedBytes);
  using Copies = decltype(copies_of<Config>(params, maps...));
  if (is_left_to_decode<Config>(params)) {
    ptx::allow_next_kernel();
    // Whoever waits for this kernel waits for the one before too; the last block's multiprocessor is rarely the last one in work.
    if (blockIdx.x == gridDim.x - 1) ptx::wait_for_previous_kernel();
    return;
  }
  if (threadIdx.x == 0) {
    shared.template init<Copies>(Shared::kRecordLanes);
    ptx::prefetch_tensor_map(&queries);
    (ptx::prefetch_tensor_map(&maps), ...);
  }
  __syncthreads();
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();
  Roles::run(
      [&] {
        if (warp_idx() < Copies::kWarps) {
          PrefillLoader<Config, Params, Copies>(params, queries, copies_of<Config>(params, maps...), shared).run();
        }
      },
      [&](int warpgroup) { PrefillConsumer<Config, Params>(params, shared, warpgroup).run(); });
}

}  // namespace fi
