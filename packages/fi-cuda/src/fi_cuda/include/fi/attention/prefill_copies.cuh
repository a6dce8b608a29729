// How keys and values of prefill are copied, which follows from what the kernel is made for.
#pragma once

#include "fi/attention/prefill_boxes.cuh"
#include "fi/attention/prefill_gather.cuh"
#include "fi/attention/prefill_landed.cuh"
#include "fi/attention/prefill_rows.cuh"

namespace fi {

// Without tensor maps: whole steps leave producers too few registers for RowCopies.
template <class Config, class Params>
__device__ __forceinline__ auto direct_copies_of(const Params& params) {
  if constexpr (kGathered<Config>) return GatherCopies<Config, Params>(params);
  else return RowCopies<Config, Params>(params);
}
template <class Config, class Params>
__device__ __forceinline__ auto direct_copies_of(const Params& params, const ptx::TensorMap& keys, const ptx::TensorMap& values) {
  if constexpr (kGathered<Config>) return GatherCopies<Config, Params>(params, keys, values);
  else return BoxCopies<Config, Params>(params, keys, values);
}

// `maps`: none, or those of K and V.
template <class Config, class Params, class... Maps>
__device__ __forceinline__ auto copies_of(const Params& params, const Maps&... maps) {
  using Direct = decltype(direct_copies_of<Config>(params, maps...));
  if constexpr (PrefillTile<Config>::kLanded) return LandedCopies<Config, Params, Direct>(Direct(params, maps...));
  else return Direct(params, maps...);
}

}  // namespace fi
