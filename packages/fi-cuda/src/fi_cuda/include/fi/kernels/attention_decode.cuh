// Attention of requests with few query rows (decode, speculative verification), bound by reading K and V once.
//
// One block a multiprocessor works through its worker's items of the plan. The warps share an item's tokens in chunks;
// each has a private ring of chunks that runs on into the next items, so that loads never wait for an item's end, and its own
// online softmax; an item ends with the warps' shares added up in shared memory, and a split tile with a merge by its workers.
// Sources: online softmax (Milakov and Gimelshein, 2018), split KV (Dao et al., 2023, Flash-Decoding), pages (Kwon et al.,
// 2023, section 4), equal shares of the work ("stream-K", Osama et al., 2023).
// Config: Dtype (q, out), Stored (K, V), kHeadDim, kHeadDimVo, kGroupSize, kPageSize (0: ragged), kTable, kTableRow, kRows
// (packed query rows a tile), kNumWarps, kStages, kCausal, kWindowed, kSoftCap, kAlibi, kSinks, kMask, kKScales, kVScales,
// kLse, kBatchInvariant, kChunkTokens (16 or 32), kBoxes (K and V through tensor maps), kRowWarps (warps that share a tile's
// rows), Query (q's type), kQScales, kRotaryDim (0: no RoPE), kRopePairs, kRopeKeys. Params: those of fi_cuda.kernels.attention.decode.
#pragma once

#include "fi/attention/load_boxes.cuh"
#include "fi/attention/load_rows.cuh"
#include "fi/attention/partials.cuh"
#include "fi/pipeline/cursor.cuh"
#include "fi/ptx/dependent_launch.cuh"

namespace fi {

constexpr int kItemsAtOnce = 64;

// Byte offsets into dynamic shared memory.
template <class Config>
struct DecodeShared {
  static constexpr int kTokenWarps = WarpPlace<Config>::kTokenWarps;
  static constexpr int kRingBytes = Config::kStages * ChunkStage<Config>::kBytes;
  static constexpr int kShares = kTokenWarps * kRingBytes;
  static constexpr int kItems = kShares + static_cast<int>(sizeof(Shares<Config>));
  static constexpr int kFlag = kItems + kItemsAtOnce * static_cast<int>(sizeof(AttentionItem));
  static constexpr int kBarriers = kFlag + 16;
  static constexpr int kFilled = kTokenWarps * Config::kStages;  // barriers that count a chunk's bytes
  // Where warps share chunks, as many that count those who are through with a chunk.
  static constexpr int kNumBarriers = WarpPlace<Config>::kRowWarps == 1 ? kFilled : 2 * kFilled;
  static constexpr int kRotations = (kBarriers + kNumBarriers * 8 + 15) / 16 * 16;
  static constexpr int kBytes = kRotations + Rotations<Config>::kBytes + ChunkStage<Config>::kAlignment;
};

// The block's next `count` items into shared memory; the worker's first one lies beside its range.
template <int kThreads>
__device__ __forceinline__ void fetch_items(AttentionItem* items, const AttentionItem* list, const AttentionItem* first, int count) {
  constexpr int kParts = sizeof(AttentionItem) / 16;
#pragma unroll 1
  for (int part = threadIdx.x; part < count * kParts; part += kThreads) {
    const int4* from = reinterpret_cast<const int4*>(first != nullptr && part < kParts ? first : list);
    reinterpret_cast<int4*>(items)[part] = from[part];
  }
}

// Zeros in the place of values that are not readable: a weight of zero does not cancel a NaN.
template <class Config>
__device__ __forceinline__ void clear_unreadable(unsigned char* stage, int position, int lowest, int kv_end, int lane) {
  using Stage = ChunkStage<Config>;
  using Rows = typename Stage::Values;
  const bool readable = position + lane >= lowest && position + lane < kv_end;
  if (lane < Config::kChunkTokens && !readable) {
#pragma unroll
    for (int column = 0; column < Rows::kColumns; ++column) {
#pragma unroll
      for (int byte = 0; byte < Rows::kSwizzle; byte += 16) {
        unsigned char* unit = stage + Stage::kValueBegin + column * Rows::kColumnBytes + lane * Rows::kSwizzle + byte;
        *reinterpret_cast<int4*>(unit) = int4{};
      }
    }
    ptx::fence_proxy_async_shared();  // the stage's next copies come after
  }
  __syncwarp();
}

template <class Config, class Params>
__device__ __forceinline__ Rotator<Config> rotator_of(const Params& params, unsigned char* shared) {
  return Rotator<Config>(shared, static_cast<const float*>(params.inv_freq), params.rope_factor);
}

template <class Config, class Params, class Loader>
__device__ __forceinline__ void attend_items(
    const Params& params, const Loader& loader, unsigned char* shared, int count, RingCursor<Config::kStages>& place) {
  using Shared = DecodeShared<Config>;
  using State = DecodeState<Config, Params>;
  using Stage = ChunkStage<Config>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const WarpPlace<Config> warp;
  unsigned char* ring = shared + warp.token_warp * Shared::kRingBytes;
  unsigned long long* barriers =
      reinterpret_cast<unsigned long long*>(shared + Shared::kBarriers) + warp.token_warp * Config::kStages;
  const AttentionItem* items = reinterpret_cast<const AttentionItem*>(shared + Shared::kItems);
  ItemFinisher<Config, Params> finisher(params, *reinterpret_cast<Shares<Config>*>(shared + Shared::kShares),
                                        reinterpret_cast<int*>(shared + Shared::kFlag));
  ChunkWalk<Config, Params> walk(params, items, count);
  // Warps that share chunks drift apart by a chunk at least: what is filled next is not what was used last.
  constexpr bool kShared = WarpPlace<Config>::kRowWarps > 1;
  constexpr int kAhead = kShared && Config::kStages > 2 ? Config::kStages - 2 : Config::kStages - 1;
  unsigned long long* through = barriers + Shared::kFilled;
  RingCursor<Config::kStages> next = {place.stage, place.parity ^ 1u};
  const auto load_next = [&] {
    if (warp.row_warp != 0 || walk.done()) return;
    if constexpr (kShared) ptx::wait_barrier(through + next.stage, next.parity);
    loader.load(walk, ring + next.stage * Stage::kBytes, barriers + next.stage);
    next.advance();
    walk.advance();
  };
#pragma unroll 1  // once is code enough
  for (int ahead = 0; ahead < kAhead; ++ahead) load_next();

  const Rotator<Config> rotator = rotator_of<Config>(params, shared + Shared::kRotations);
  ChunkTurn<Shared::kTokenWarps> turn = {0};
  for (int idx = 0; idx < count; ++idx) {
    const AttentionItem item = items[idx];
    State state(params, item, rotator, warp.first_row(), lane);
    const ColumnLimits whole = State::seen_by_all(params, item);
    const int lowest = lowest_position<Config>(item, params.window), num_chunks = num_chunks_of<Stage::kTokens>(item);
    for (int chunk = turn.first_chunk(warp.token_warp); chunk < num_chunks; chunk += Shared::kTokenWarps) {
      const int position = item.kv_begin + chunk * Stage::kTokens;
      const bool masked = position < whole.low || position + Stage::kTokens > whole.high;
      unsigned char* stage = ring + place.stage * Stage::kBytes;
      __syncwarp();  // all lanes are through with the stage that is filled next
      load_next();
      if constexpr (Rotations<Config>::kKeys) rotator.prepare_keys(position);
      ptx::wait_barrier(barriers + place.stage, place.parity);
      if (!Loader::kZeroesUnread && masked) {
        if (warp.row_warp == 0) clear_unreadable<Config>(stage, position, lowest, item.kv_end, lane);
        warp.sync();
      }
      state.attend(params, item, rotator, stage, position, masked, lane);
      if constexpr (kShared) {
        __syncwarp();
        if (lane == 0) ptx::arrive(through + place.stage);
      }
      place.advance();
    }
    turn.pass(num_chunks);
    finisher.finish(item, state);
  }
}

// The loader that the kernel's parameters allow.
template <class Config, class Params>
__device__ __forceinline__ RowLoader<Config, Params> loader_of(const Params& params) {
  return RowLoader<Config, Params>(params);
}
template <class Config, class Params>
__device__ __forceinline__ BoxLoader<Config, Params> loader_of(
    const Params& params, const ptx::TensorMap& keys, const ptx::TensorMap& values) {
  return BoxLoader<Config, Params>(params, keys, values);
}

// `maps`: none, or those of K and V.
template <class Config, class Params, class... Maps>
__device__ __forceinline__ void attention_decode(const Params& params, const Maps&... maps) {
  using Shared = DecodeShared<Config>;
  extern __shared__ __align__(128) unsigned char unaligned[];
  unsigned char* shared = unaligned + (-ptx::shared_address(unaligned) & (ChunkStage<Config>::kAlignment - 1));
  const auto loader = loader_of<Config>(params, maps...);
  AttentionItem* items = reinterpret_cast<AttentionItem*>(shared + Shared::kItems);
  for (int idx = threadIdx.x; idx < Shared::kNumBarriers; idx += Config::kNumThreads) {
    const int arrivals = idx < Shared::kFilled ? loader.kArrivals : WarpPlace<Config>::kRowWarps;
    ptx::init_barrier(reinterpret_cast<unsigned long long*>(shared + Shared::kBarriers) + idx, arrivals);
  }
  ptx::fence_barrier_init();
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();
  const WorkerStart* start = static_cast<const WorkerStart*>(params.starts) + blockIdx.x;
  const AttentionItem* list = static_cast<const AttentionItem*>(params.items);
  const int begin = start->begin, end = start->end;
  if constexpr (Rotations<Config>::kKeys) rotator_of<Config>(params, shared + Shared::kRotations).fill_table();
  auto place = RingCursor<Config::kStages>::consumer();
  for (int first = begin; first < end; first += kItemsAtOnce) {
    const int count = min(end - first, kItemsAtOnce);
    fetch_items<Config::kNumThreads>(items, list + first, first == begin ? &start->first : nullptr, count);
    __syncthreads();
    attend_items<Config>(params, loader, shared, count, place);
    __syncthreads();
  }
}

}  // namespace fi
