// What becomes of a warpgroup's rows of an item: the output, or, if the tile was split, a slot from which the warpgroup that
// finishes last merges the tile's pieces in the plan's order. Equal inputs and plan give equal bits, whoever merges.
//
// Pieces meet at a counter that needs no reset: the first piece adds 2^31 - (pieces - 1) and every other 1, so the top bit flips
// when all are there and the rest is 0 again.
#pragma once

#include "fi/attention/prefill_state.cuh"
#include "fi/ptx/ldmatrix.cuh"

namespace fi {

template <class Config, class Params>
class PrefillStore {
  using Tile = PrefillTile<Config>;
  using Dtype = typename Config::Dtype;
  using State = PrefillState<Config, Params>;
  using Rows = QueriesAsRows;
  static constexpr int kOutputs = Config::kHeadDimVo / 2;
  static constexpr int kColumnTiles = Config::kHeadDimVo / 8, kUnits = kColumnTiles;  // of 16 bytes

 public:
  // Whether `staging`, the queries of the warpgroup's rows, is written. Of one stage they are wanted back before the output is ready;
  // FP8 has half the room.
  static constexpr bool kStaged = Config::kQueryStages > 1 && !Tile::kFp8 && Config::kHeadDimVo <= Config::kHeadDim &&
                                  (Tile::kGroup & (Tile::kGroup - 1)) == 0 && (kUnits & (kUnits - 1)) == 0 && kUnits <= kWarpThreads;

  __device__ __forceinline__ PrefillStore(const Params& params, int* flag, int warpgroup, unsigned char* staging)
      : params_(params), flag_(flag), staging_(staging), warpgroup_(warpgroup), lane_(thread_anew() % kWarpThreads),
        first_row_(thread_anew() / kWarpThreads * 16 + lane_ / 4) {}

  // Called by all threads of the warpgroup.
  __device__ __forceinline__ void finish(const AttentionItem& item, State& state) const {
    PartialRow rows[2] = {state.softmax.row(0), state.softmax.row(1)};
    float scale = value_scale(item);
    if (item.slot >= 0) {
      leave_piece(item, rows, state.output, scale);
      if (!is_last(item)) return;
      merge(item, rows, state.output);
      scale = 1.0f;
    }
    store(item, rows, state.output, scale);
  }

  // The query head of the thread's row.
  __device__ __forceinline__ int head_of(const AttentionItem& item, int row) const {
    return item.kv_head * Tile::kGroup + row_of(row) % Tile::kGroup;
  }

 protected:
  __device__ __forceinline__ float value_scale(const AttentionItem& item) const {
    if constexpr (!Config::kVScales) return params_.v_scale;
    return params_.v_scale * static_cast<const float*>(params_.v_scales)[item.kv_head * params_.v_scale_stride];
  }

  __device__ __forceinline__ int row_of(int row) const { return first_row_ + row * 8; }
  // The token of one of the warpgroup's 64 rows.
  __device__ __forceinline__ int token_at(const AttentionItem& item, int row) const {
    return item.q_tile * Tile::kTileTokens + warpgroup_ * Tile::kGroupTokens + row / Tile::kGroup;
  }
  __device__ __forceinline__ bool is_live_at(const AttentionItem& item, int row) const {
    return row < Tile::kGroupRows && token_at(item, row) < item.q_len;
  }
  __device__ __forceinline__ Dtype* address_of(const AttentionItem& item, int row) const {
    const int64 token = item.q_begin + token_at(item, row), head = item.kv_head * Tile::kGroup + row % Tile::kGroup;
    return static_cast<Dtype*>(params_.out) + token * params_.out_stride_token + head * params_.out_stride_head;
  }
  __device__ __forceinline__ int token_of(const AttentionItem& item, int row) const { return token_at(item, row_of(row)); }
  __device__ __forceinline__ bool is_live(const AttentionItem& item, int row) const { return is_live_at(item, row_of(row)); }

  // Rows to the output, sinks included.
  __device__ __forceinline__ void store(const AttentionItem& item, const PartialRow (&rows)[2], float (&output)[kOutputs],
                                        float scale) const {
    float factor[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const bool live = is_live(item, row);
      const int head = head_of(item, row);
      float sink = minus_infinity();
      if constexpr (Config::kSinks) {
        if (live) sink = static_cast<const float*>(params_.sinks)[head];
      }
      const RowResult result = finish_row(rows[row], sink);
      factor[row] = result.scale * scale;
      if constexpr (Config::kLse) {
        const int64 token = item.q_begin + token_of(item, row);
        if (live && lane_ % 4 == 0) static_cast<float*>(params_.lse)[token * params_.lse_stride_token + head] = result.lse;
      }
    }
    // A row without keys has the factor 0, and zeros whatever its output is.
    if (__any_sync(0xffffffffu, factor[0] == 0.0f || factor[1] == 0.0f)) {
#pragma unroll
      for (int idx = 0; idx < kOutputs; ++idx) output[idx] = factor[Rows::row(idx)] == 0.0f ? 0.0f : output[idx];
    }
    if constexpr (kStaged) store_by_rows(item, output, factor);
    else if constexpr (Tile::kFp8) store_interleaved(item, output, factor);
    else store_by_quads(item, output, factor);
  }

  // By way of shared memory: a warp's rows lie where its queries were, units of 16 bytes swizzled, and go from there as they lie in
  // the output. A lane has a unit of every kStride-th row.
  __device__ __forceinline__ void store_by_rows(const AttentionItem& item, const float (&output)[kOutputs],
                                                const float (&factor)[2]) const {
    constexpr int kPitch = Tile::kKeyColumns * kBoxRowBytes, kStride = kWarpThreads / kUnits, kRows = 16 / kStride;
    const int warp_row = first_row_ - lane_ / 4, own = lane_ % 16;
    unsigned char* slab = staging_ + warp_row * kPitch;
    const unsigned place = own * kPitch + (lane_ / 16 ^ own % 8) * 16;
#pragma unroll
    for (int tile = 0; tile < kUnits; tile += 2) {
      const unsigned parts[4] = {pair(output, tile, 0, factor[0]), pair(output, tile, 1, factor[1]),
                                 pair(output, tile + 1, 0, factor[0]), pair(output, tile + 1, 1, factor[1])};
      ptx::stmatrix_x4(slab + (place ^ tile * 16), parts);
    }
    __syncwarp();
    const int row = lane_ / kUnits, unit = lane_ % kUnits;
    const int64 stride_token = params_.out_stride_token, stride_head = params_.out_stride_head;
    const int tokens_left = item.q_len - token_at(item, warp_row + row);
    Dtype* to = address_of(item, warp_row + row) + unit * 8;
    uint4 whole[kRows];
#pragma unroll
    for (int idx = 0; idx < kRows; ++idx) {
      const int its = row + idx * kStride;
      whole[idx] = *reinterpret_cast<const uint4*>(slab + its * kPitch + (unit ^ its % 8) * 16);
    }
#pragma unroll
    for (int idx = 0; idx < kRows; ++idx) {
      // kStride and the heads of a token are powers of two.
      const int token = idx * kStride / Tile::kGroup, head = idx * kStride % Tile::kGroup;
      if (token < tokens_left) __stcg(reinterpret_cast<uint4*>(to + token * stride_token + head * stride_head), whole[idx]);
    }
  }

  // From registers. Lane t of a quad has columns 2 t and 2 t + 1 of every 8: quads exchange what they have of 32 columns, after
  // which a lane stores 8 neighbours.
  __device__ __forceinline__ void store_by_quads(const AttentionItem& item, const float (&output)[kOutputs],
                                                 const float (&factor)[2]) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const bool live = is_live(item, row);
      Dtype* to = address_of(item, row_of(row));
#pragma unroll
      for (int tile = 0; tile + 4 <= kColumnTiles; tile += 4) {
        unsigned parts[4];
#pragma unroll
        for (int idx = 0; idx < 4; ++idx) parts[idx] = pair(output, tile + idx, row, factor[row]);
        transpose_quad(parts);
        const uint4 whole = {parts[0], parts[1], parts[2], parts[3]};
        if (live) __stcg(reinterpret_cast<uint4*>(to + (tile + lane_ % 4) * 8), whole);
      }
#pragma unroll
      for (int tile = kColumnTiles / 4 * 4; tile < kColumnTiles; ++tile) {
        const unsigned part = pair(output, tile, row, factor[row]);
        if (live) *reinterpret_cast<unsigned*>(to + tile * 8 + lane_ % 4 * 2) = part;
      }
    }
  }

  // Of transposed values: of 16 dims the accumulators have the even ones in 8 columns and the odd ones in the 8 that follow, so
  // lane t of a quad has dims 4 t to 4 t + 3.
  __device__ __forceinline__ void store_interleaved(const AttentionItem& item, const float (&output)[kOutputs],
                                                    const float (&factor)[2]) const {
    const int dim = lane_ % 4 * 4;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const bool live = is_live(item, row);
      Dtype* to = address_of(item, row_of(row));
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; tile += 2) {
        const float* even = output + tile * 4 + row * 2;
        const uint2 four = {pair(even[0], even[4], factor[row]), pair(even[1], even[5], factor[row])};
        if (live) *reinterpret_cast<uint2*>(to + tile * 8 + dim) = four;
      }
    }
  }

  static __device__ __forceinline__ unsigned pair(float first, float second, float factor) {
    return pair_of<Dtype>(first * factor, second * factor);
  }
  static __device__ __forceinline__ unsigned pair(const float (&output)[kOutputs], int tile, int row, float factor) {
    const int idx = tile * 4 + row * 2;
    return pair(output[idx], output[idx + 1], factor);
  }

  // Lane t gets element t of lanes 0 to 3 of its quad, in their order.
  __device__ __forceinline__ void transpose_quad(unsigned (&parts)[4]) const {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const bool upper = (lane_ & distance) != 0;
#pragma unroll
      for (int idx = 0; idx < 4; ++idx) {
        if ((idx & distance) != 0) continue;
        const unsigned given = upper ? parts[idx] : parts[idx + distance];
        const unsigned got = __shfl_xor_sync(0xffffffffu, given, distance);
        if (upper) parts[idx] = got;
        else parts[idx + distance] = got;
      }
    }
  }

  __device__ __forceinline__ int64 slot_row(int slot, int row) const {
    return (static_cast<int64>(slot) * Config::kConsumers + warpgroup_) * 64 + row_of(row);
  }
  __device__ __forceinline__ float2* partial_of(int slot, int row) const {
    return reinterpret_cast<float2*>(params_.partials) + slot_row(slot, row) * (Config::kHeadDimVo / 2) + lane_ % 4;
  }

  // Normalised rows and their log-sum-exps in base 2 to the item's slot; a row without keys has -inf and zeros.
  __device__ __forceinline__ void leave_piece(const AttentionItem& item, const PartialRow (&rows)[2],
                                              const float (&output)[kOutputs], float scale) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (!is_live(item, row)) continue;
      const RowResult result = finish_row(rows[row]);
      const bool none = result.scale == 0.0f;
      const float factor = result.scale * scale;
      float2* to = partial_of(item.slot, row);
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        const int idx = tile * 4 + row * 2;
        __stcg(to + tile * 4, none ? float2{} : float2{output[idx] * factor, output[idx + 1] * factor});
      }
      if (lane_ % 4 == 0) __stcg(static_cast<float*>(params_.partial_rows) + slot_row(item.slot, row), result.lse * kLog2E);
    }
  }

  // Counts the piece; whether it was the tile's last.
  __device__ __forceinline__ bool is_last(const AttentionItem& item) const {
    const int barrier = kOwnBarrier + warpgroup_;
    ptx::named_barrier_sync(barrier, kWarpgroupThreads);  // every thread's part of the piece is written
    if (threadIdx.x % kWarpgroupThreads == 0) {
      int* counter = static_cast<int*>(params_.arrivals) + item.merge_idx * Config::kConsumers + warpgroup_;
      const unsigned amount = item.slot == item.head_slot ? 0x80000000u - (item.num_pieces() - 1) : 1u;
      const int before = ptx::add_acq_rel(counter, static_cast<int>(amount));
      *flag_ = (before ^ static_cast<int>(static_cast<unsigned>(before) + amount)) < 0;
    }
    ptx::named_barrier_sync(barrier, kWarpgroupThreads);
    return *flag_ != 0;
  }

  // The tile's pieces together: an unnormalised output and its rows.
  __device__ __forceinline__ void merge(const AttentionItem& item, PartialRow (&rows)[2], float (&output)[kOutputs]) const {
    const int pieces = item.num_pieces();
#pragma unroll
    for (int row = 0; row < 2; ++row) rows[row] = empty_row();
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece) {
      const int slot = item.slot_of(piece);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float lse = __ldcg(static_cast<const float*>(params_.partial_rows) + slot_row(slot, row));
        const MergedRow merged = merge_rows(rows[row], {lse, lse == minus_infinity() ? 0.0f : 1.0f});
        rows[row] = merged.row;
        const float2* from = partial_of(slot, row);
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) {
          const int idx = tile * 4 + row * 2;
          const float2 part = __ldcg(from + tile * 4);
          output[idx] = part.x * merged.scale_second + (piece == 0 ? 0.0f : output[idx] * merged.scale_first);
          output[idx + 1] = part.y * merged.scale_second + (piece == 0 ? 0.0f : output[idx + 1] * merged.scale_first);
        }
      }
    }
  }

  const Params& params_;
  int* flag_;
  unsigned char* staging_;
  const int warpgroup_, lane_, first_row_;
};

}  // namespace fi
