// Writes new keys and values into a cache, with RoPE on K and q and FP8 quantisation (Kwon et al., 2023, section 4).
//
// kThreadsPerToken threads (whole warps) take a slice of a token's heads. Each loads its packs, and meanwhile (or before,
// kFoundFirst) every warp finds the token's request, position and place; what has a place is then rotated, converted and stored.
// Config: Dtype, Stored, kHeadDim, kHeadDimVo, kPageSize (0: ragged), kAddressing, kCount (elements a pack), kRotaryDim
// (0: no RoPE), kPairs, kAngleBytes (0: computed), kThreadsPerToken, kQRounds (0: no q), kKRounds, kVRounds, kNumThreads;
// kWhole: bits 0 to 2 for q, K and V: the rounds of all threads are just the heads; kPacked: heads follow each other;
// kScalesPerHead: some stride of scales is not 0; kStreaming: cached lines leave L2 first.
// Params: k, v, q [tokens, heads, dim]; *_strides (outer: token, inner: head); k_cache, v_cache with *_cache_strides (outer:
// page, inner: token) and *_head_stride; *_scales (null: the scale is *_scale) with *_scale_stride (0: one for all heads);
// q_indptr, kv_lens; table, table_row, indptr, slots, what kAddressing needs; rope (cos_sin or inv_freq), rope_stride, factor.
#pragma once

#include "fi/kv/heads.cuh"
#include "fi/kv/place.cuh"
#include "fi/kv/request.cuh"
#include "fi/ptx/dependent_launch.cuh"

namespace fi {

// What becomes of a token. `live`: it belongs to a request and, with RoPE, has an angle; `placed`: it is also stored.
struct Destination {
  bool live;
  bool placed;
  int position;
  Place place;
};

template <class Config, class Params>
__device__ __forceinline__ Destination destination_of(int64 token, const Params& params) {
  constexpr bool kUsesSlots = Config::kAddressing == kSlots;
  const int* q_indptr = static_cast<const int*>(params.q_indptr);
  Destination found = {};
  int64 slot = 0;
  if constexpr (kUsesSlots) slot = static_cast<const int64*>(params.slots)[token];
  if constexpr (kUsesSlots && Config::kRotaryDim == 0) {
    found.live = token < q_indptr[params.num_requests];
  } else {
    const PageTable table = {static_cast<const int*>(params.table), static_cast<const int*>(params.table_row),
                             static_cast<const int*>(params.indptr), params.table_stride};
    const RequestOfToken row = request_of<Config::kAddressing>(
        token, q_indptr, static_cast<const int*>(params.kv_lens), table, params.num_requests);
    if (row.request == params.num_requests) return found;
    // Row `token` is so many rows before the request's end as its position is before the request's last one.
    found.position = static_cast<int>(token - row.end) + row.kv_len;
    found.live = found.position >= 0;
    if constexpr (!kUsesSlots) {
      if (!found.live) return found;
      found.place = place_of_position<Config::kAddressing, Config::kPageSize>(table, row.origin, found.position);
    }
  }
  if constexpr (kUsesSlots) {
    found.placed = found.live && slot >= 0;
    if (found.placed) found.place = place_of_slot<Config::kPageSize>(slot);
  } else {
    found.placed = found.live;
  }
  return found;
}

template <class Config, class Params>
__device__ __forceinline__ void append_kv(const Params& params) {
  using T = typename Config::Dtype;
  using Stored = typename Config::Stored;
  constexpr int kThreads = Config::kThreadsPerToken;
  constexpr int kRotaryDim = Config::kRotaryDim;
  constexpr bool kQWhole = (Config::kWhole & 1) != 0;
  constexpr bool kKWhole = (Config::kWhole & 2) != 0;
  constexpr bool kVWhole = (Config::kWhole & 4) != 0;
  constexpr bool kPerHead = Config::kScalesPerHead;
  // Which comes first, the load of K and V or the way to their place, is what was measured to be faster.
  constexpr bool kFoundFirst =
      kIsFp8<Stored> && kRotaryDim > 0 && Config::kQRounds == 0 && Config::kNumThreads > Config::kThreadsPerToken;
  constexpr int kDim = Config::kHeadDim;
  constexpr int kDimVo = Config::kHeadDimVo;
  using QSplit = HeadSplit<T, Config::kCount, kDim, kRotaryDim, Config::kPairs, kThreads, Config::kQRounds, kQWhole>;
  using KSplit = HeadSplit<T, Config::kCount, kDim, kRotaryDim, Config::kPairs, kThreads, Config::kKRounds, kKWhole>;
  using VSplit = HeadSplit<T, Config::kCount, kDimVo, 0, kNoRope, kThreads, Config::kVRounds, kVWhole>;
  static_assert(kThreads % 32 == 0 && Config::kNumThreads % kThreads == 0, "a warp serves one token");

  const unsigned thread = threadIdx.x % kThreads;
  const int slice = static_cast<int>(blockIdx.y);
  const int token =
      static_cast<int>(blockIdx.x) * (Config::kNumThreads / kThreads) + static_cast<int>(threadIdx.x) / kThreads;
  HeadShare q_share = QSplit::share(thread, slice, params.num_q_heads);
  if (!q_share.rotated) q_share.num_heads = 0;  // in place: what does not rotate stays
  const HeadShare k_share = KSplit::share(thread, slice, params.num_kv_heads);
  const HeadShare v_share = VSplit::share(thread, slice, params.num_kv_heads);

  const int64 k_inner = Config::kPacked ? kDim : params.k_strides.inner;
  const int64 v_inner = Config::kPacked ? kDimVo : params.v_strides.inner;
  const int64 q_inner = Config::kPacked ? kDim : params.q_strides.inner;
  const int64 k_head_stride = Config::kPacked ? kDim : params.k_head_stride;
  const int64 v_head_stride = Config::kPacked ? kDimVo : params.v_head_stride;
  int64 k_source = token * params.k_strides.outer + k_share.offset(k_inner);
  int64 v_source = token * params.v_strides.outer + v_share.offset(v_inner);
  int64 q_source = token * params.q_strides.outer + q_share.offset(q_inner);
  // Keeps the compiler from moving the arithmetic behind the wait.
  asm volatile("" : "+l"(k_source), "+l"(v_source));
  if constexpr (Config::kQRounds > 0) asm volatile("" : "+l"(q_source));
  if (token >= params.num_tokens) return;
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();

  T* q = static_cast<T*>(params.q) + q_source;
  HeldHeads<QSplit> q_held;
  HeldHeads<KSplit> k_held;
  HeldHeads<VSplit> v_held;
  HeadScales<QSplit, T, false> q_scales;
  HeadScales<KSplit, Stored, kPerHead> k_scales;
  HeadScales<VSplit, Stored, kPerHead> v_scales;
  Destination found = {};
  if constexpr (kFoundFirst) found = destination_of<Config>(token, params);
  q_held.load(q, q_inner, q_share);
  k_held.load(static_cast<const T*>(params.k) + k_source, k_inner, k_share);
  v_held.load(static_cast<const T*>(params.v) + v_source, v_inner, v_share);
  q_scales.load(nullptr, 0, 1.0f, q_share);
  k_scales.load(params.k_scales, params.k_scale_stride, params.k_scale, k_share);
  v_scales.load(params.v_scales, params.v_scale_stride, params.v_scale, v_share);

  if constexpr (!kFoundFirst) found = destination_of<Config>(token, params);
  if (!found.live) return;
  Rotation<Config::kCount> rotation = {};
  if constexpr (kRotaryDim > 0) {
    if (k_share.rotated) {
      const int first_pair = static_cast<int>(thread % KSplit::kUnits) * Config::kCount;
      const float* rope = static_cast<const float*>(params.rope);
      if constexpr (Config::kAngleBytes > 0) {
        const float* row = rope + found.position * params.rope_stride;
        rotation = rotation_from_table<Config::kCount, Config::kAngleBytes>(row, kRotaryDim / 2, first_pair);
      } else {
        rotation = rotation_at<Config::kCount>(found.position, rope, first_pair, params.factor);
      }
    }
  }
  q_held.template store<false>(q, q_inner, q_share, rotation, q_scales);
  if constexpr (Config::kAddressing == kSlots) {  // elsewhere all that lives has a place
    if (!found.placed) return;
  }
  const int64 k_target = place_offset(found.place, params.k_cache_strides) + k_share.offset(k_head_stride);
  const int64 v_target = place_offset(found.place, params.v_cache_strides) + v_share.offset(v_head_stride);
  Stored* k_cache = static_cast<Stored*>(params.k_cache) + k_target;
  Stored* v_cache = static_cast<Stored*>(params.v_cache) + v_target;
  k_held.template store<Config::kStreaming>(k_cache, k_head_stride, k_share, rotation, k_scales);
  v_held.template store<Config::kStreaming>(v_cache, v_head_stride, v_share, rotation, v_scales);
}

}  // namespace fi
