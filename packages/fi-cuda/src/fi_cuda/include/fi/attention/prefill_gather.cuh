// Keys and values of prefill gathered row by row, as they are stored: pages of any size, and caches that no tensor map
// describes. A whole warpgroup copies, 16 bytes at a time, straight to where the copy engine's swizzle would have put them.
#pragma once

#include "fi/attention/prefill_dense.cuh"
#include "fi/attention/prefill_table.cuh"
#include "fi/ptx/bulk_copy.cuh"
#include "fi/ptx/cp_async.cuh"
#include "fi/ptx/elect.cuh"
#include "fi/ptx/tma.cuh"
#include "fi/tile/swizzle.cuh"

namespace fi {

// A lane looks up one row of its warp's a step; a look-up is on its way for a step before its rows are copied, keys' and values'
// from the same one, out of shared memory. Producers have few registers: what a row needs is computed when its turn comes.
template <class Config, class Params>
class GatherCopies {
  using Tile = PrefillTile<Config>;
  using Shared = PrefillShared<Config>;
  using Factor = typename Tile::Factor;
  static constexpr bool kPaged = Config::kTable != kRagged;
  static constexpr int kPageSize = kPaged ? Config::kPageSize : 1;
  static constexpr int kUnits = kBoxRowBytes / 16;  // lanes that copy a row's part of a column
  static constexpr int kRowsAtOnce = kWarpThreads / kUnits;
  static constexpr int kUnitElements = 16 / static_cast<int>(sizeof(Factor));
  static constexpr int kTokens = Config::kTokens;
  static constexpr bool kOneCursor = Config::kCopyOrder != kKeysAhead && Config::kKeyStages == Config::kValueStages;
  static constexpr bool kSameToken = kRowsAtOnce % kPageSize == 0;  // of its page, in all of a thread's rows
  // In the place of a row that is not readable: the nearest one that is, as masks hide either; of longer pages, zeros.
  static constexpr bool kClamped = kPageSize == 1;
  static constexpr int kNone = -1;  // in the place of a page: becomes zeros

 public:
  static constexpr bool kRuns = Config::kBoxTokens > 0;  // a warp's rows that follow each other in memory come as boxes
  static constexpr int kWarps = kWarpgroupThreads / kWarpThreads;
  static constexpr int kKeyArrivals = kWarps, kValueArrivals = kWarps;
  using Place = int;  // the page (ragged: row) of a row that a lane looks up

 private:
  static constexpr int kWarpRows = kTokens / kWarps;
  static constexpr int kRounds = kWarpRows / kRowsAtOnce;
  static constexpr int kRunBytes = kWarpRows * kBoxRowBytes;
  // Of a first step's keys consumers multiply whole units, so none of the rows of a warp that has no readable one.
  static constexpr bool kMayLeaveOut = kSameToken && kWarpRows % Config::kEdgeTokens == 0;
  static constexpr int kNothing = 0;  // where no barrier is
  template <int kDim>
  static constexpr int kColumns = (kDim + Tile::kBoxElements - 1) / Tile::kBoxElements;
  static_assert(kTokens % (kWarps * kRowsAtOnce) == 0 && kRounds <= kUnits, "a lane looks up one row a step");
  static_assert(!kRuns || (kPageSize == 1 && Config::kBoxTokens == kWarpRows && kRounds == kUnits));
  static_assert(sizeof(typename Config::Stored) == sizeof(Factor));
  static constexpr int kStepColumns = kColumns<Config::kHeadDim> + kColumns<Config::kHeadDimVo>;
  static_assert(kWarps == kDenseWarps);

  // Keys or values: a lane's part of the first row, in elements.
  struct Source {
    const Factor* first;
    int64 page_stride, token_stride;
    const ptx::TensorMap* map;
  };

 public:
  __device__ __forceinline__ explicit GatherCopies(const Params& params) : params_(params) {}
  __device__ __forceinline__ GatherCopies(const Params& params, const ptx::TensorMap& keys, const ptx::TensorMap& values)
      : params_(params), key_map_(&keys), value_map_(&values) {}

  __device__ __forceinline__ void enter(const AttentionItem& item, const ItemSteps<Config>& steps) {
    table_ = RequestTable<Config, Params>(params_, item.request);
    kv_head_ = item.kv_head;
    kv_end_ = item.kv_end;
    last_ = steps.last;
    lowest_ = steps.lowest;
  }

  // The page (ragged: row) of one of the rows that this lane and its seven neighbours copy: unit u of them has that of round u.
  __device__ __forceinline__ int place_of(int step) const {
    const int thread = thread_anew(), round = thread % kUnits;
    int position = position_of(step, thread) + round * kRowsAtOnce;
    if (round >= kRounds) return kNone;
    if constexpr (kClamped) {
      if (lowest_ >= kv_end_) return kNone;
      position = max(min(position, kv_end_ - 1), lowest_);
    } else {
      if (position < lowest_ || position >= kv_end_) return kNone;
    }
    return kPaged ? table_.entries[position / kPageSize] : table_.first_row + position;
  }

  // The last copies of an item.
  __device__ __forceinline__ void leave(Shared& shared) {
    if (pending_ != kNothing) pass_on<0>(shared);
    pending_ = kNothing;
  }

  // The item makes a dense copy or reads one.
  __device__ __forceinline__ void begin_dense(Shared& shared, const DensePlace<Config>& place) {
    keeps_ = place.is_kept;
    if (thread_anew() % kWarpThreads == 0) shared.looked_up.dense[thread_anew() / kWarpThreads] = {place.step * kStepColumns, place.owner, 0};
    __syncwarp();
  }

  // Behind the last copies of an item: what is kept of it may be read from now on.
  __device__ __forceinline__ void end_dense(Shared& shared) {
    if (!keeps_) return;
    leave(shared);
    keeps_ = false;
    ptx::bulk_wait<0>();
    if (ptx::elect_one()) {
      const int num_steps = (kv_end_ + kTokens - 1) / kTokens;
      const DenseCopy its = shared.looked_up.dense[thread_anew() / kWarpThreads];
      publish_dense(params_, its.owner, its.column / kStepColumns - num_steps);
    }
    __syncwarp();
  }

  __device__ __forceinline__ bool keeps() const { return Config::kDenseTiles > 0 && keeps_; }

  // Whether the warp's rows of a step are all before `end`.
  __device__ __forceinline__ bool is_before(int end, int step) const {
    return position_of(step, warp_of(thread_anew()) * kWarpThreads) + kWarpRows <= end;
  }

  // Whether rows of a step follow each other in memory, from `first`: all of a warp.
  static __device__ __forceinline__ bool is_run(int place, int first) {
    const int lane = thread_anew() % kWarpThreads;
    return __all_sync(0xffffffffu, place == first + lane / kUnits + lane % kUnits * kRowsAtOnce);
  }
  static __device__ __forceinline__ bool is_run(int place) { return is_run(place, first_of(place)); }
  __device__ __forceinline__ void look_for_runs(Shared& shared, bool looks) {
    looks_ = looks && !keeps();
    const int thread = thread_anew();
    if (looks_ && thread % kWarpThreads == 0) shared.looked_up.dense[thread / kWarpThreads].is_in_order = 1;
    __syncwarp();
  }

  template <bool kCopied = false>
  __device__ __forceinline__ void load_keys(Shared& shared, int step, int place) {
    if constexpr (!kCopied) {
      shared.looked_up.places[step % 2][thread_anew()] = place;
      __syncwarp();
    }
    const Source keys{first_of_head(params_.k, params_.k_stride_head), kPaged ? params_.k_stride_page : params_.k_stride_token, params_.k_stride_token, key_map_};
    load<Config::kHeadDim, kCopied>(keys, shared, shared.keys[key_.stage], shared.key_ring, key_, step, place, 0);
    if constexpr (!kOneCursor) key_.advance();
  }
  template <bool kCopied = false>
  __device__ __forceinline__ void load_values(Shared& shared, int step, int place) {
    const Source values{first_of_head(params_.v, params_.v_stride_head), kPaged ? params_.v_stride_page : params_.v_stride_token, params_.v_stride_token, value_map_};
    auto& cursor = value_place();
    load<Config::kHeadDimVo, kCopied>(values, shared, shared.values[cursor.stage], shared.value_ring, cursor, step, place,
                                    kColumns<Config::kHeadDim>);
    cursor.advance();
  }

 private:
  static __device__ __forceinline__ int warp_of(int thread) { return thread / kWarpThreads; }
  // A thread's row of round 0, within a step.
  static __device__ __forceinline__ int row_of(int thread) {
    return thread / kWarpThreads * kWarpRows + thread % kWarpThreads / kUnits;
  }
  __device__ __forceinline__ int position_of(int step, int thread) const { return last_ - step * kTokens + row_of(thread); }

  // A lane's part of the item's head. Made anew each time: kept it would take registers.
  __device__ __forceinline__ const Factor* first_of_head(const void* cache, int64 stride) const {
    int head = kv_head_;
    asm volatile("" : "+r"(head));
    return static_cast<const Factor*>(cache) + head * stride + thread_anew() % kUnits * kUnitElements;
  }

  __device__ __forceinline__ auto& value_place() {
    if constexpr (kOneCursor) return key_;
    else return value_;
  }

  // A stage is full once its threads have seen their copies arrive and shown them to the products: consumers need no fence of their
  // own, which stood in their way from one product to the next. kLeft: 1 if other copies were started since.
  template <int kLeft>
  __device__ __forceinline__ void pass_on(Shared& shared) {
    ptx::cp_async_wait<kLeft>();
    ptx::fence_proxy_async_shared();
    __syncwarp();
    auto* full = reinterpret_cast<unsigned long long*>(reinterpret_cast<unsigned char*>(&shared) + pending_);
    if (ptx::elect_one()) {
      ptx::arrive(full);
      if constexpr (Config::kDenseTiles > 0) {
        if (keeps_) keep(shared);
      }
    }
  }

  // first_column: of a dense copy's step.
  template <int kDim, bool kCopied, int kStages>
  __device__ __forceinline__ void load(const Source& source, Shared& shared, unsigned char* stage, Ring<kStages>& ring,
                                       const RingCursor<kStages>& cursor, int step, int place, int first_column) {
    // Consumers must not wait for copies that are there until the next stage is free.
    if (!__all_sync(0xffffffffu, ring.is_free(cursor))) {
      leave(shared);
      ring.acquire(cursor);
    }
    if constexpr (kCopied) {
      leave(shared);
      copy_dense<kDim>(shared, stage, ring, cursor, step * kStepColumns + first_column);
      return;
    }
    if (keeps()) {
      ptx::bulk_wait_read<2 * (Config::kKeyStages < Config::kValueStages ? Config::kKeyStages : Config::kValueStages) - 2>();
      __syncwarp();
    }
    if (kRuns && looks_) {
      const int first = first_of(place);
      if (is_run(place, first)) {
        leave(shared);
        copy_run<kDim>(*source.map, stage, ring, cursor, first);
        return;
      }
    }
    const int first_row = warp_of(thread_anew()) * kWarpThreads;  // a thread's number
    if (!kMayLeaveOut || position_of(step, first_row) < kv_end_) copy_rows<kDim>(source, shared, stage, step);
    ptx::cp_async_commit();
    if (pending_ != kNothing) pass_on<1>(shared);
    else __syncwarp();  // all lanes have read the places before those of a later step take theirs
    const unsigned char* full = reinterpret_cast<unsigned char*>(&ring.full[cursor.stage]);
    pending_ = static_cast<int>(full - reinterpret_cast<unsigned char*>(&shared));
  }

  static __device__ __forceinline__ int first_of(int place) { return __shfl_sync(0xffffffffu, place, 0); }

  template <int kDim, int kStages>
  __device__ __forceinline__ void copy_run(const ptx::TensorMap& map, unsigned char* stage, Ring<kStages>& ring,
                                           const RingCursor<kStages>& cursor, int first) {
    const int warp = warp_idx();
    if (ptx::elect_one()) {
      unsigned long long* full = ring.expect(cursor, kColumns<kDim> * kRunBytes);
#pragma unroll
      for (int column = 0; column < kColumns<kDim>; ++column) {
        ptx::tma_load_4d(stage + column * Tile::kKeyColumnBytes + warp * kRunBytes, &map, full, column * Tile::kBoxElements, 0,
                         kv_head_, first);
      }
    }
    __syncwarp();
  }

  template <int kDim, int kStages>
  __device__ __forceinline__ void copy_dense(const Shared& shared, unsigned char* stage, Ring<kStages>& ring,
                                             const RingCursor<kStages>& cursor, int column_of_item) {
    const int warp = warp_idx();
    if (ptx::elect_one()) {
      unsigned long long* full = ring.expect(cursor, kColumns<kDim> * kRunBytes);
      const unsigned first = shared.looked_up.dense[warp].column + column_of_item;
#pragma unroll
      for (int column = 0; column < kColumns<kDim>; ++column) {
        ptx::bulk_load(stage + column * Tile::kKeyColumnBytes + warp * kRunBytes, dense_column(first + column, warp), kRunBytes, full);
      }
    }
    __syncwarp();
  }

  // The warp's rows of the pending stage to where the next of its dense copy are kept.
  __device__ __forceinline__ void keep(Shared& shared) {
    const int stage = stage_of(shared, shared.key_ring);
    if (0 <= stage && stage < Config::kKeyStages) keep<Config::kHeadDim>(shared, shared.keys[stage]);
    else keep<Config::kHeadDimVo>(shared, shared.values[stage_of(shared, shared.value_ring)]);
    ptx::bulk_commit();
  }
  template <int kDim>
  __device__ __forceinline__ void keep(Shared& shared, const unsigned char* stage) {
    const int warp = warp_of(thread_anew());
    const unsigned first = shared.looked_up.dense[warp].column;
    shared.looked_up.dense[warp].column = first + kColumns<kDim>;
#pragma unroll
    for (int column = 0; column < kColumns<kDim>; ++column) {
      ptx::bulk_store(dense_column(first + column, warp), stage + column * Tile::kKeyColumnBytes + warp * kRunBytes, kRunBytes);
    }
  }

  // A column of a warp's rows of a step; those of a warp lie together.
  __device__ __forceinline__ unsigned char* dense_column(unsigned column, int warp) const {
    const unsigned first = static_cast<unsigned>(params_.dense_steps) * kStepColumns * warp;
    return static_cast<unsigned char*>(params_.dense) + static_cast<uint64>(first + column) * kRunBytes;
  }

  // Which stage of a ring is pending, if it is one of its.
  template <int kStages>
  __device__ __forceinline__ int stage_of(const Shared& shared, const Ring<kStages>& ring) const {
    const auto* first = reinterpret_cast<const unsigned char*>(ring.full);
    const int offset = static_cast<int>(first - reinterpret_cast<const unsigned char*>(&shared));
    return (pending_ - offset) / static_cast<int>(sizeof(ring.full[0]));
  }

  template <int kDim>
  __device__ __forceinline__ void copy_rows(const Source& source, const Shared& shared, unsigned char* stage, int step) {
    const int thread = thread_anew(), unit = thread % kUnits;
    // As near_strides_of of fi_cuda.kernels.attention.state has it, they fit.
    unsigned page_bytes = static_cast<unsigned>(source.page_stride * sizeof(Factor));
    unsigned token_bytes = static_cast<unsigned>(source.token_stride * sizeof(Factor));
    asm volatile("" : "+r"(page_bytes), "+r"(token_bytes));  // kept from step to step they would take registers too
    const unsigned position = position_of(step, thread) + (kSameToken ? 0 : unit * kRowsAtOnce);
    const int token = position % kPageSize;  // of the row that is looked up here; else of all of the thread's rows
    const unsigned char* first = reinterpret_cast<const unsigned char*>(source.first);
    if constexpr (kSameToken) first += offset_of(token, token_bytes);
    int offset = swizzled<kBoxRowBytes>(row_of(thread) * kBoxRowBytes + unit * 16);
    asm volatile("" : "+r"(offset));  // known bits would make "or" of what is an immediate after a sum
    unsigned char* even = stage + offset;
    unsigned char* odd = stage + (offset ^ 64);  // four rows further on the pattern has its other half
    const int* places = &shared.looked_up.places[step % 2][thread / kUnits * kUnits];
    int2 two;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (round % 2 == 0) two = *reinterpret_cast<const int2*>(places + round);
      const int page = round % 2 == 0 ? two.x : two.y;
      const bool readable = kClamped || page != kNone;
      const unsigned char* row = first + offset_of(readable ? page : 0, page_bytes);
      if constexpr (!kSameToken) row += offset_of(__shfl_sync(0xffffffffu, token, round, kUnits), token_bytes);
      unsigned char* to = (round % 2 == 0 ? even : odd) + round * kRowsAtOnce * kBoxRowBytes;
#pragma unroll
      for (int column = 0; column < kColumns<kDim>; ++column) {
        if (column * Tile::kBoxElements + unit * kUnitElements < kDim) {
          ptx::cp_async_16(to + column * Tile::kKeyColumnBytes, row + column * kBoxRowBytes, readable);
        }
      }
    }
  }

  static __device__ __forceinline__ uint64 offset_of(unsigned count, unsigned stride) { return uint64{count} * stride; }

  const Params& params_;
  RequestTable<Config, Params> table_;
  int kv_end_ = 0, last_ = 0, lowest_ = 0;
  const ptx::TensorMap *key_map_ = nullptr, *value_map_ = nullptr;
  int kv_head_ = 0;
  bool looks_ = false;      // for runs
  bool keeps_ = false;      // the item's rows, for others
  int pending_ = kNothing;  // where in shared memory the barrier of the stage is whose copies are under way
  RingCursor<Config::kKeyStages> key_ = RingCursor<Config::kKeyStages>::producer();
  RingCursor<Config::kValueStages> value_ = RingCursor<Config::kValueStages>::producer();
};

}  // namespace fi
