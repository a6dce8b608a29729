// Drawn tokens into sparse histories, as fi_core.record_tokens defines it: a block a row, its tokens one after the other, all
// threads looking for a token's entry.
// Config: kNumThreads. Params: tokens int64 [rows, num_tokens]; slots (int64: the history of a row, below 0: none; null: in order);
// seen (seen_stride words a history, seen_words of them), entries (pairs of token and count, entry_stride words a history,
// capacity pairs), num_entries, num_output int32.
#pragma once

#include "fi/ptx/dependent_launch.cuh"
#include "fi/tile/host_device.cuh"

namespace fi {

template <class Config, class Params>
__device__ __forceinline__ void record_tokens(const Params& params) {
  __shared__ int found;
  const int64 index = blockIdx.x;
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();
  const int64 slot = params.slots == nullptr ? index : static_cast<const int64*>(params.slots)[index];
  if (slot < 0) return;
  const int64* tokens = static_cast<const int64*>(params.tokens) + index * params.tokens_stride;
  int2* entries = reinterpret_cast<int2*>(static_cast<int*>(params.entries) + slot * params.entry_stride);
  unsigned* seen = static_cast<unsigned*>(params.seen) + slot * params.seen_stride;
  int* num_entries = static_cast<int*>(params.num_entries) + slot;
  const bool leads = threadIdx.x == 0;
  int held = *num_entries;
  int added = 0;
#pragma unroll 1
  for (int step = 0; step < params.num_tokens; ++step) {
    const int64 token = tokens[step];
    if (token < 0 || token >= 32ll * params.seen_words) continue;
    if (leads) found = -1;
    __syncthreads();  // also: what the step before wrote is seen
    const int in_use = min(held, params.capacity);
#pragma unroll 4
    for (int entry = static_cast<int>(threadIdx.x); entry < in_use; entry += Config::kNumThreads) {
      if (entries[entry].x == static_cast<int>(token)) found = entry;  // one at most
    }
    __syncthreads();
    const int entry = found;
    if (leads) {
      if (entry >= 0) {
        ++entries[entry].y;
      } else if (held < params.capacity) {
        entries[held] = make_int2(static_cast<int>(token), 1);
      }
      seen[token / 32] |= 1u << (token % 32);
    }
    if (entry < 0 && held <= params.capacity) ++held;
    ++added;
    __syncthreads();  // all have read what the next step overwrites
  }
  if (leads && added > 0) {
    *num_entries = held;
    static_cast<int*>(params.num_output)[slot] += added;
  }
}

}  // namespace fi
