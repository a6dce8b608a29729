// The three ways in which keys and values of prefill are copied, and which of them a kernel takes.
#pragma once

#include "fi/attention/prefill_boxes.cuh"
#include "fi/attention/prefill_gather.cuh"
#include "fi/attention/prefill_rows.cuh"

namespace fi {

// Without tensor maps: whole steps leave producers too few registers for RowCopies.
template <class Config, class Params>
__device__ __forceinline__ auto copies_of(const Params& params) {
  constexpr bool kUnconverted = sizeof(typename Config::Stored) == sizeof(typename Config::Dtype);
  if constexpr (kUnconverted && !Config::kOverlap) return GatherCopies<Config, Params>(params);
  else return RowCopies<Config, Params>(params);
}
template <class Config, class Params>
__device__ __forceinline__ BoxCopies<Config, Params> copies_of(const Params& params, const ptx::TensorMap& keys,
                                                               const ptx::TensorMap& values) {
  return BoxCopies<Config, Params>(params, keys, values);
}

}  // namespace fi
