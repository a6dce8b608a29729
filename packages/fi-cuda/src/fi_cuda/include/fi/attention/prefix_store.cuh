// What becomes of the rows of an item where prefixes are shared: the output, or rows of partial results, which are merged once
// every block has left its own. The parts of a row are added up in the order of its segments, so equal inputs give equal bits.
#pragma once

#include "fi/attention/prefill_store.cuh"
#include "fi/attention/prefix_list.cuh"

namespace fi {

template <class Config, class Params>
class PrefixStore : public PrefillStore<Config, Params> {
  using Base = PrefillStore<Config, Params>;
  using Tile = PrefillTile<Config>;
  using State = PrefillState<Config, Params>;
  static constexpr int kOutputs = Config::kHeadDimVo / 2;

 public:
  using Base::Base;

  // Called by all threads of the warpgroup.
  __device__ __forceinline__ void finish(const AttentionItem& item, State& state) const {
    const PartialRow rows[2] = {state.softmax.row(0), state.softmax.row(1)};
    const float scale = Base::value_scale(item);
    if (item.slot < 0) Base::store(item, rows, state.output, scale);
    else leave_parts(item, rows, state.output, scale);
  }

 private:
  // Normalised rows and their log-sum-exps in base 2; a row without keys has -inf and zeros.
  __device__ __forceinline__ void leave_parts(const AttentionItem& item, const PartialRow (&rows)[2],
                                              const float (&output)[kOutputs], float scale) const {
    // Rows of a tile stand side by side, as its tokens do.
    const int before = item.q_tile * Tile::kTileTokens + Base::warpgroup_ * Tile::kGroupTokens;
    const int num_rows = min((item.q_len - before) * Tile::kGroup, Tile::kGroupRows);
    const int64 first = item.slot + (static_cast<int64>(item.kv_head) * item.q_len + before) * Tile::kGroup;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (Base::row_of(row) >= num_rows) continue;
      const RowResult result = finish_row(rows[row]);
      const bool none = result.scale == 0.0f;
      const float factor = result.scale * scale;
      const int64 part = first + Base::row_of(row);
      float* to = static_cast<float*>(Base::params_.parts) + part * Config::kHeadDimVo + Base::lane_ % 4 * (Tile::kFp8 ? 4 : 2);
      const auto value = [&](int idx) { return none ? 0.0f : output[idx] * factor; };
#pragma unroll
      for (int tile = 0; tile < kOutputs / 4; tile += Tile::kFp8 ? 2 : 1) {
        const int idx = tile * 4 + row * 2;
        // Transposed values' dims lie as in store_interleaved.
        if constexpr (Tile::kFp8) {
          __stcg(reinterpret_cast<float4*>(to + tile * 8), float4{value(idx), value(idx + 4), value(idx + 1), value(idx + 5)});
        } else {
          __stcg(reinterpret_cast<float2*>(to + tile * 8), float2{value(idx), value(idx + 1)});
        }
      }
      if (Base::lane_ % 4 == 0) __stcg(static_cast<float*>(Base::params_.part_logs) + part, result.lse * kLog2E);
    }
  }
};

// A row of the output from its parts, a warp at a time.
template <class Config, class Params>
class PrefixMerger {
  using Dtype = typename Config::Dtype;
  static constexpr int kThreads = Config::kConsumers * kWarpgroupThreads;
  static constexpr int kUnits = Config::kHeadDimVo / 4;  // of four dims
  static constexpr int kUnitsOfLane = (kUnits + kWarpThreads - 1) / kWarpThreads;
  static constexpr int kMergeBarrier = kOwnBarrier + Config::kConsumers;
  static constexpr int kAtOnce = 8 / kUnitsOfLane;  // parts whose values are loaded before the first is added

 public:
  // Called by all consumers of all blocks, after their last item; `thread` counts a block's consumers.
  __device__ __forceinline__ PrefixMerger(const Params& params, int thread)
      : params_(params), thread_(thread), lane_(thread % kWarpThreads) {}

  __device__ __forceinline__ void run() const {
    const int num_merged = static_cast<const PrefixHeader*>(params_.header)->num_merged;
    if (num_merged == 0) return;
    const int num_heads = params_.num_kv_heads * Config::kGroupSize, num_rows = num_merged * num_heads;
    const int num_warps = static_cast<int>(gridDim.x) * (kThreads / kWarpThreads);
    int row = (thread_ / kWarpThreads) * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
    PartSegment mine = segment_of(row / num_heads, row < num_rows);  // not the blocks' affair
    wait_for_blocks();
#pragma unroll 1
    for (; row < num_rows; row += num_warps) {
      const int next = row + num_warps;
      const PartSegment its = segment_of(next / num_heads, next < num_rows);
      merge(mine, row % num_heads);
      mine = its;
    }
  }

 private:
  // All blocks are resident. The counter needs no reset: its top bit flips when all are there, and the rest is 0 again.
  __device__ __forceinline__ void wait_for_blocks() const {
    ptx::named_barrier_sync(kMergeBarrier, kThreads);  // every thread's parts are written
    if (thread_ == 0) {
      int* counter = static_cast<int*>(params_.barrier);
      const unsigned amount = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
      const int before = ptx::add_acq_rel(counter, static_cast<int>(amount));
      while ((ptx::load_acquire(counter) ^ before) >= 0) {
      }
    }
    ptx::named_barrier_sync(kMergeBarrier, kThreads);
  }

  // The lane's segment of a merged token; one of no pieces past the capacity.
  __device__ __forceinline__ PartSegment segment_of(int idx, bool exists) const {
    PartSegment mine = {};
    if (exists && lane_ < params_.max_segments) {
      const int64 place = static_cast<int64>(idx) * params_.max_segments + lane_;
      *reinterpret_cast<int4*>(&mine) = __ldg(static_cast<const int4*>(params_.segments) + place);
    }
    return mine;
  }

  __device__ __forceinline__ void merge(const PartSegment& mine, int head) const {
    const int kv_head = head / Config::kGroupSize, in_group = head % Config::kGroupSize;
    // Past the last segment nothing is read.
    const unsigned used = __ballot_sync(0xffffffffu, mine.num_pieces > 0);
    const int num_segments = __ffs(~used) == 0 ? kWarpThreads : __ffs(~used) - 1;
    PartialRow total = empty_row();
    float values[kUnitsOfLane][4] = {};
    const int token = __shfl_sync(0xffffffffu, mine.token, 0);
#pragma unroll 1
    for (int segment = 0; segment < num_segments; ++segment) {
      const int head_rows = __shfl_sync(0xffffffffu, mine.head_rows, segment);
      const int num_pieces = __shfl_sync(0xffffffffu, mine.num_pieces, segment);
      const int first = __shfl_sync(0xffffffffu, mine.first, segment) + kv_head * head_rows + in_group;
      // A node's rows were given logits of positions one after the other: ALiBi's differ by the same for all keys.
      float shift = 0.0f;
      if constexpr (Config::kAlibi) {
        const int later = __shfl_sync(0xffffffffu, mine.token, segment);
        if (segment > 0) shift = static_cast<const float*>(params_.slopes)[head] * kLog2E * static_cast<float>(later);
      }
#pragma unroll 1
      for (int piece = 0; piece < num_pieces; piece += kAtOnce) {
        add_parts(first + static_cast<int64>(piece) * params_.num_kv_heads * head_rows,
                  static_cast<int64>(params_.num_kv_heads) * head_rows, min(num_pieces - piece, kAtOnce), shift, total, values);
      }
    }
    store(token, head, total, values);
  }

  // Adds parts that lie `step` rows apart, up to kAtOnce, whose logits are to be raised by `shift`.
  __device__ __forceinline__ void add_parts(int64 first, int64 step, int count, float shift, PartialRow& total,
                                            float (&values)[kUnitsOfLane][4]) const {
    float4 parts[kAtOnce][kUnitsOfLane];
    float logs[kAtOnce];
#pragma unroll
    for (int idx = 0; idx < kAtOnce; ++idx) {
      logs[idx] = minus_infinity();
      if (idx >= count) continue;
      const int64 row = first + idx * step;
      logs[idx] = __ldcg(static_cast<const float*>(params_.part_logs) + row) + shift;
#pragma unroll
      for (int own = 0; own < kUnitsOfLane; ++own) {
        const int unit = own * kWarpThreads + lane_;
        if (unit < kUnits) parts[idx][own] = __ldcg(static_cast<const float4*>(params_.parts) + row * kUnits + unit);
      }
    }
    float base = total.base;
#pragma unroll
    for (int idx = 0; idx < kAtOnce; ++idx) base = Largest()(base, logs[idx]);
    const float kept = ptx::exp2_approx(total.base - finite_base(base));
    total = {base, total.mass * kept};
#pragma unroll
    for (int own = 0; own < kUnitsOfLane; ++own) {
#pragma unroll
      for (int e = 0; e < 4; ++e) values[own][e] *= kept;
    }
#pragma unroll
    for (int idx = 0; idx < kAtOnce; ++idx) {
      if (idx >= count) continue;
      const float weight = ptx::exp2_approx(logs[idx] - finite_base(base));
      total.mass += weight;
#pragma unroll
      for (int own = 0; own < kUnitsOfLane; ++own) {
        const float4& part = parts[idx][own];
        values[own][0] = fmaf(part.x, weight, values[own][0]);
        values[own][1] = fmaf(part.y, weight, values[own][1]);
        values[own][2] = fmaf(part.z, weight, values[own][2]);
        values[own][3] = fmaf(part.w, weight, values[own][3]);
      }
    }
  }

  // Sinks included.
  __device__ __forceinline__ void store(int64 token, int head, PartialRow total, const float (&values)[kUnitsOfLane][4]) const {
    float sink = minus_infinity();
    if constexpr (Config::kSinks) sink = static_cast<const float*>(params_.sinks)[head];
    const RowResult result = finish_row(total, sink);
    Dtype* to = static_cast<Dtype*>(params_.out) + token * params_.out_stride_token + head * params_.out_stride_head;
#pragma unroll
    for (int own = 0; own < kUnitsOfLane; ++own) {
      const int unit = own * kWarpThreads + lane_;
      if (unit >= kUnits) continue;
      Pack<Dtype, 4 * sizeof(Dtype)> out;
#pragma unroll
      for (int e = 0; e < 4; ++e) out.data[e] = from_float<Dtype>(values[own][e] * result.scale);
      store_pack(to + unit * 4, out);
    }
    if constexpr (Config::kLse) {
      if (lane_ == 0) static_cast<float*>(params_.lse)[token * params_.lse_stride_token + head] = result.lse;
    }
  }

  const Params& params_;
  const int thread_, lane_;
};

}  // namespace fi
