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
// rows), kHeadWarps (KV heads of a tile, a warp each), Query (q's type), kQScales, kRotaryDim (0: no RoPE), kRopePairs, kRopeKeys. Params: those of fi_cuda.kernels.attention.decode.
#pragma once

#include "fi/attention/load_boxes.cuh"
#include "fi/attention/load_rows.cuh"
#include "fi/attention/partials.cuh"
#include "fi/pipeline/cursor.cuh"
#include "fi/ptx/dependent_launch.cuh"
#include "fi/ptx/fence.cuh"
#include "fi/ptx/tma.cuh"

namespace fi {

constexpr int kItemsAtOnce = 64;

// Byte offsets into dynamic shared memory.
template <class Config>
struct DecodeShared {
  static constexpr int kRings = WarpPlace<Config>::kRings;
  static constexpr int kRingBytes = Config::kStages * ChunkStage<Config>::kBytes;
  static constexpr int kShares = kRings * kRingBytes;
  static constexpr int kItems = kShares + WarpPlace<Config>::kHeadWarps * static_cast<int>(sizeof(Shares<Config>));
  static constexpr int kBarriers = kItems + kItemsAtOnce * static_cast<int>(sizeof(AttentionItem));
  static constexpr int kMeetings = kBarriers + kRings * Config::kStages * 8;
  static constexpr int kRotations = (kMeetings + kRings * ChunkMeeting<Config>::kBarriers * 8 + 15) / 16 * 16;
  static constexpr int kBytes = kRotations + Rotations<Config>::kBytes + ChunkStage<Config>::kAlignment;
};

constexpr int kItemParts = sizeof(AttentionItem) / 16;

// The block's next items into shared memory, from number `have` to number `count`.
template <int kThreads>
__device__ __forceinline__ void fetch_items(AttentionItem* items, const AttentionItem* list, int have, int count) {
#pragma unroll 1
  for (int part = have * kItemParts + static_cast<int>(threadIdx.x); part < count * kItemParts; part += kThreads) {
    reinterpret_cast<int4*>(items)[part] = reinterpret_cast<const int4*>(list)[part];
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
    for (int byte = 0; byte < Rows::kColumns * Rows::kSwizzle; byte += 16) {
      *reinterpret_cast<int4*>(stage + Stage::kValueBegin + Rows::place(lane, byte)) = int4{};
    }
    ptx::fence_proxy_async_shared();  // the stage's next copies come after
  }
  __syncwarp();
}

template <class Config, class Params>
__device__ __forceinline__ Rotator<Config> rotator_of(const Params& params, unsigned char* shared) {
  return Rotator<Config>(shared, static_cast<const float*>(params.inv_freq), params.rope_factor);
}

// Attends to `count` items in shared memory, which the block's worker has `before` others before and `after` after.
template <class Config, class Params, class Loader>
__device__ __forceinline__ void attend_items(const Params& params, const Loader& loader, unsigned char* shared, int before,
                                             int count, int after, RingCursor<Config::kStages>& place,
                                             ChunkMeeting<Config>& meeting) {
  using Shared = DecodeShared<Config>;
  using State = DecodeState<Config, Params>;
  using Stage = ChunkStage<Config>;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const WarpPlace<Config> warp;
  unsigned char* ring = shared + warp.ring * Shared::kRingBytes;
  unsigned long long* barriers =
      reinterpret_cast<unsigned long long*>(shared + Shared::kBarriers) + warp.ring * Config::kStages;
  const AttentionItem* items = reinterpret_cast<const AttentionItem*>(shared + Shared::kItems);
  ItemFinisher<Config, Params> finisher(params, reinterpret_cast<Shares<Config>*>(shared + Shared::kShares)[warp.head_warp]);
  ChunkWalk<Config, Params> walk(params, items, count);
  const Rotator<Config> rotator = rotator_of<Config>(params, shared + Shared::kRotations);
  int next_stage = place.stage, num_due = warp.row_warp == 0 ? Config::kStages : 0;
  ChunkTurn<WarpPlace<Config>::kTokenWarps> turn = {0};
  AttentionItem item;
  State state;
  ColumnLimits whole = {0, 0};
  int idx = -1, chunk = 0, num_chunks = 0, lowest = 0;
  // One loop over the chunks and ends of all items, so that there is one copy of each part: a kernel that runs once reads its
  // instructions from memory too.
#pragma unroll 1
  while (true) {
    meeting.sync();  // all are through with the stage that is filled next
#pragma unroll 1
    for (; num_due > 0 && !walk.done(); --num_due) {
      loader.load(walk, ring + next_stage * Stage::kBytes, barriers + next_stage);
      next_stage = next_stage + 1 == Config::kStages ? 0 : next_stage + 1;
      walk.advance();
    }
    if (chunk < num_chunks) {
      const int position = item.kv_begin + chunk * Stage::kTokens;
      const bool masked = position < whole.low || position + Stage::kTokens > whole.high;
      unsigned char* stage = ring + place.stage * Stage::kBytes;
      if constexpr (Rotations<Config>::kKeys) rotator.prepare_keys(position);
      ptx::wait_barrier(barriers + place.stage, place.parity);
      if (!Loader::kZeroesUnread && masked) {
        if (warp.row_warp == 0) clear_unreadable<Config>(stage, position, lowest, item.kv_end, lane);
        if constexpr (WarpPlace<Config>::kRowWarps > 1) meeting.sync();
      }
      state.attend(params, item, rotator, stage, position, masked, lane);
      place.advance();
      chunk += WarpPlace<Config>::kTokenWarps;
      num_due = warp.row_warp == 0;
      continue;
    }
    AttentionItem next = {};
    if (idx + 1 < count) {
      next = warp.own(items[idx + 1]);
      state.load(params, next, warp.first_row(), lane);  // arrives while the item before is finished
    }
    if (idx >= 0) finisher.finish(item, state, before + idx, after + count - 1 - idx);
    if (++idx == count) break;
    item = next;
    state.begin(params, item, rotator, lane);
    finisher.prepare(item);
    whole = State::seen_by_all(params, item);
    lowest = lowest_position<Config>(item, params.window);
    turn.pass(num_chunks);
    chunk = turn.first_chunk(warp.token_warp);
    num_chunks = num_chunks_of<Stage::kTokens>(item);
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

// What a block reads first: its range of the plan's items, and of the first of them, which lies beside it, 16 bytes a thread.
struct DecodeStart {
  int begin, end;
  int4 part;

  template <class Params>
  __device__ __forceinline__ explicit DecodeStart(const Params& params) : part{} {
    const WorkerStart* start = static_cast<const WorkerStart*>(params.starts) + blockIdx.x;
    begin = start->begin;
    end = start->end;
    if (threadIdx.x < kItemParts) part = reinterpret_cast<const int4*>(&start->first)[threadIdx.x];
  }
};

// The block's barriers, made before its items are known, or given up; by its first Config::kNumThreads threads.
template <class Config>
class DecodeBarriers {
  using Shared = DecodeShared<Config>;

 public:
  __device__ __forceinline__ explicit DecodeBarriers(unsigned char* shared)
      : stages_(reinterpret_cast<unsigned long long*>(shared + Shared::kBarriers) + warp_.ring * Config::kStages),
        meeting_(reinterpret_cast<unsigned long long*>(shared + Shared::kMeetings) + warp_.ring) {}

  // Before the block's next barrier.
  __device__ __forceinline__ void init(int arrivals) const {
    if (is_first()) {
#pragma unroll
      for (int stage = 0; stage < Config::kStages; ++stage) ptx::init_barrier(stages_ + stage, arrivals);
      meeting_.init();
    }
    ptx::fence_barrier_init();
  }

  // So that the memory, after the block's next barrier, may be used for something else.
  __device__ __forceinline__ void invalidate() const {
    if (is_first()) {
#pragma unroll
      for (int stage = 0; stage < Config::kStages; ++stage) ptx::invalidate_barrier(stages_ + stage);
      meeting_.invalidate();
    }
    ptx::fence_proxy_async_shared();
  }

  __device__ __forceinline__ ChunkMeeting<Config> meeting() const { return meeting_; }

 private:
  __device__ __forceinline__ bool is_first() const { return threadIdx.x % 32 == 0 && warp_.row_warp == 0; }

  const WarpPlace<Config> warp_;
  unsigned long long* stages_;
  ChunkMeeting<Config> meeting_;
};

template <class Config>
__device__ __forceinline__ unsigned char* decode_memory() {
  extern __shared__ __align__(128) unsigned char unaligned[];
  return unaligned + (-ptx::shared_address(unaligned) & (ChunkStage<Config>::kAlignment - 1));
}

// What a block does once the kernels before are done and its barriers made, by its first Config::kNumThreads threads: others, if
// there are any, have ended. `start` may still be on its way. `maps`: none, or those of K and V.
template <class Config, class Params, class... Maps>
__device__ __forceinline__ void decode_items(const Params& params, const DecodeStart& start, const Maps&... maps) {
  using Shared = DecodeShared<Config>;
  unsigned char* shared = decode_memory<Config>();
  const auto loader = loader_of<Config>(params, maps...);
  AttentionItem* items = reinterpret_cast<AttentionItem*>(shared + Shared::kItems);
  const AttentionItem* list = static_cast<const AttentionItem*>(params.items);
  ChunkMeeting<Config> meeting = DecodeBarriers<Config>(shared).meeting();
  if (threadIdx.x < kItemParts) reinterpret_cast<int4*>(items)[threadIdx.x] = start.part;
  if constexpr (Rotations<Config>::kKeys) rotator_of<Config>(params, shared + Shared::kRotations).fill_table();
  auto place = RingCursor<Config::kStages>::consumer();
  for (int first = start.begin; first < start.end; first += kItemsAtOnce) {
    const int count = min(start.end - first, kItemsAtOnce);
    fetch_items<Config::kNumThreads>(items, list + first, first == start.begin, count);
    __syncthreads();
    attend_items<Config>(params, loader, shared, first - start.begin, count, start.end - first - count, place, meeting);
    __syncthreads();
  }
}

// `maps`: as above.
template <class Config, class Params, class... Maps>
__device__ __forceinline__ void attention_decode(const Params& params, const Maps&... maps) {
  if (threadIdx.x == 0) (ptx::prefetch_tensor_map(&maps), ...);
  ptx::wait_for_previous_kernel();
  ptx::allow_next_kernel();
  const DecodeStart start(params);
  DecodeBarriers<Config>(decode_memory<Config>()).init(loader_of<Config>(params, maps...).kArrivals);
  decode_items<Config>(params, start, maps...);
}

}  // namespace fi
