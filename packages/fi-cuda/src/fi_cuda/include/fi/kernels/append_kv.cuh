// Writes new keys and values into a cache, with RoPE on K and q and FP8 quantisation (Kwon et al., 2023, section 4).
//
// kThreadsPerToken threads (whole warps) take a slice of a token's heads. Each loads its packs, and meanwhile every warp finds
// the token's request, position and place; what has a place is then rotated, converted and stored. The longest way is the one of
// loads that need one another (request, then page and angles), so nothing is waited for before all that does not is asked for.
// Config: Dtype, Stored, kHeadDim, kHeadDimVo, kPageSize (0: ragged), kAddressing, kCount (elements a pack), kRotaryDim
// (0: no RoPE), kPairs, kAngleBytes (0: computed), kThreadsPerToken, kQRounds (0: no q), kKRounds, kVRounds, kNumThreads;
// kWhole: bits 0 to 2 for q, K and V: the rounds of all threads are just the heads; kPacked: heads follow each other;
// kScalesPerHead: some stride of scales is not 0; kStreaming: cached lines leave L2 first; kValuesFirst: V, whose packs come in
// pairs of neighbours, is loaded first, and stored while K and its angles are under way.
// Params: k, v, q [tokens, heads, dim]; *_strides (outer: token, inner: head); k_cache, v_cache with *_cache_strides (outer:
// page, inner: token) and *_head_stride; *_scales (null: the scale is *_scale) with *_scale_stride (0: one for all heads);
// q_indptr, kv_lens; table, table_row, indptr, slots, what kAddressing needs; rope (cos_sin or inv_freq), rope_stride, factor.
#pragma once

#include "fi/kv/heads.cuh"
#include "fi/kv/place.cuh"
#include "fi/kv/request.cuh"
#include "fi/ptx/dependent_launch.cuh"

namespace fi {

// The way to a token's place in three steps, each of which only asks memory for what the next one needs: so other loads
// may stand between them.
template <class Config, class Params>
class Destination {
  static constexpr bool kUsesSlots = Config::kAddressing == kSlots;
  // Slots lead to the place by themselves; angles need the position, and so the request.
  static constexpr bool kByRequest = !kUsesSlots || Config::kRotaryDim > 0;

 public:
  bool live;  // the token belongs to a request and, with a request looked up, has a position
  int position;

  __device__ __forceinline__ Destination(const Params& params, int64 token)
      : table_{static_cast<const int*>(params.table), static_cast<const int*>(params.table_row),
               static_cast<const int*>(params.indptr), params.table_stride},
        token_(token),
        first_(guessed_run(token, params.num_requests)) {
    asm volatile("" : "+r"(first_));
  }

  __device__ __forceinline__ void start(const Params& params) {
    const int* q_indptr = static_cast<const int*>(params.q_indptr);
    if constexpr (kUsesSlots) slot_ = static_cast<const int64*>(params.slots)[token_];
    if constexpr (kByRequest) {
      run_ = load_run<Config::kAddressing>(first_, q_indptr, static_cast<const int*>(params.kv_lens), table_, params.num_requests);
    } else {
      run_.end = q_indptr[params.num_requests];
    }
  }

  __device__ __forceinline__ void find_position(const Params& params) {
    if constexpr (kByRequest) {
      const RequestOfToken row =
          request_of<Config::kAddressing>(token_, run_, static_cast<const int*>(params.q_indptr),
                                          static_cast<const int*>(params.kv_lens), table_, params.num_requests);
      origin_ = row.origin;
      // Row `token` is so many rows before the request's end as its position is before the request's last one.
      position = static_cast<int>(token_ - row.end) + row.kv_len;
      live = row.request < params.num_requests && position >= 0;
    } else {
      live = token_ < run_.end;
    }
  }

  // Of a token that is live: whether it has a place. Where there are no slots all have.
  __device__ __forceinline__ bool find_place(Place& place) const {
    if constexpr (kUsesSlots) {
      place = place_of_slot<Config::kPageSize>(slot_);
      return slot_ >= 0;
    } else {
      place = place_of_position<Config::kAddressing, Config::kPageSize>(table_, origin_, position);
      return true;
    }
  }

 private:
  PageTable table_;
  int64 token_;
  int first_;
  RequestRun run_;
  int64 slot_;
  int origin_;
};

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
  constexpr int kDim = Config::kHeadDim;
  constexpr int kDimVo = Config::kHeadDimVo;
  using QSplit = HeadSplit<T, Config::kCount, kDim, kRotaryDim, Config::kPairs, kThreads, Config::kQRounds, kQWhole>;
  using KSplit = HeadSplit<T, Config::kCount, kDim, kRotaryDim, Config::kPairs, kThreads, Config::kKRounds, kKWhole>;
  constexpr bool kValuesFirst = Config::kValuesFirst;
  using VSplit = HeadSplit<T, Config::kCount, kDimVo, kValuesFirst ? kDimVo : 0, kValuesFirst ? kInterleaved : kNoRope, kThreads,
                           Config::kVRounds, kVWhole>;
  static_assert(kThreads % 32 == 0 && Config::kNumThreads % kThreads == 0, "a warp serves one token");

  const unsigned thread = threadIdx.x % kThreads;
  const int slice = static_cast<int>(blockIdx.y);
  const int token =
      static_cast<int>(blockIdx.x) * (Config::kNumThreads / kThreads) + static_cast<int>(threadIdx.x / kThreads);
  HeadShare q_share = QSplit::share(thread, slice, params.num_q_heads);
  if (!q_share.rotated) q_share.num_heads = 0;  // in place: what does not rotate stays
  const HeadShare k_share = KSplit::share(thread, slice, params.num_kv_heads);
  const HeadShare v_share = VSplit::share(thread, slice, params.num_kv_heads);

  const int64 k_inner = Config::kPacked ? kDim : params.k_strides.inner;
  const int64 v_inner = Config::kPacked ? kDimVo : params.v_strides.inner;
  const int64 q_inner = Config::kPacked ? kDim : params.q_strides.inner;
  const int64 k_head_stride = Config::kPacked ? kDim : params.k_head_stride;
  const int64 v_head_stride = Config::kPacked ? kDimVo : params.v_head_stride;
  T* q = static_cast<T*>(params.q) + token * params.q_strides.outer + q_share.offset(q_inner);
  const T* k = static_cast<const T*>(params.k) + token * params.k_strides.outer + k_share.offset(k_inner);
  const T* v = static_cast<const T*>(params.v) + token * params.v_strides.outer + v_share.offset(v_inner);
  // Keeps the compiler from moving the arithmetic behind the wait.
  asm volatile("" : "+l"(k), "+l"(v));
  if constexpr (Config::kQRounds > 0) asm volatile("" : "+l"(q));
  Destination<Config, Params> destination(params, token);
  if (token >= params.num_tokens) return;
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();

  HeldHeads<QSplit> q_held;
  HeldHeads<KSplit> k_held;
  HeldHeads<VSplit> v_held;
  HeadScales<QSplit, T, false> q_scales;
  HeadScales<KSplit, Stored, kPerHead> k_scales;
  HeadScales<VSplit, Stored, kPerHead> v_scales;
  destination.start(params);
  q_held.load(q, q_inner, q_share);
  if constexpr (!kValuesFirst) k_held.load(k, k_inner, k_share);
  v_held.load(v, v_inner, v_share);
  q_scales.load(nullptr, 0, 1.0f, q_share);
  k_scales.load(params.k_scales, params.k_scale_stride, params.k_scale, k_share);
  v_scales.load(params.v_scales, params.v_scale_stride, params.v_scale, v_share);

  destination.find_position(params);
  if (!destination.live) return;
  Place place;
  const bool placed = destination.find_place(place);
  Rotation<Config::kCount> rotation = {};
  if constexpr (kRotaryDim > 0) {
    if (k_share.rotated) {
      const int first_pair = static_cast<int>(thread % KSplit::kUnits) * Config::kCount;
      const float* rope = static_cast<const float*>(params.rope);
      if constexpr (Config::kAngleBytes > 0) {
        const float* row = rope + destination.position * params.rope_stride;
        rotation = rotation_from_table<Config::kCount, Config::kAngleBytes>(row, kRotaryDim / 2, first_pair);
      } else {
        rotation = rotation_at<Config::kCount>(destination.position, rope, first_pair, params.factor);
      }
    }
  }
  // K is used when its angles have come, and asked for behind them: until then memory serves V, which is used first.
  if constexpr (kValuesFirst) k_held.load(k, k_inner, k_share);
  // A branch on the page, which no valid table lets be taken: without it the compiler takes V apart, and so waits for it, between
  // the loads of the angles.
  if (kValuesFirst && place.page < 0) return;
  q_held.keep();
  if constexpr (!kValuesFirst) k_held.keep();
  v_held.keep();
  q_held.template store<false>(q, q_inner, q_share, rotation, q_scales);
  if (!placed) return;
  const int64 k_target = place_offset(place, params.k_cache_strides) + k_share.offset(k_head_stride);
  const int64 v_target = place_offset(place, params.v_cache_strides) + v_share.offset(v_head_stride);
  Stored* k_cache = static_cast<Stored*>(params.k_cache) + k_target;
  Stored* v_cache = static_cast<Stored*>(params.v_cache) + v_target;
  if constexpr (kValuesFirst) {
    v_held.template store<false, false>(v_cache, v_head_stride, v_share, rotation, v_scales);
    k_held.keep();
  }
  k_held.template store<Config::kStreaming>(k_cache, k_head_stride, k_share, rotation, k_scales);
  if constexpr (!kValuesFirst) v_held.template store<Config::kStreaming>(v_cache, v_head_stride, v_share, rotation, v_scales);
}

}  // namespace fi
