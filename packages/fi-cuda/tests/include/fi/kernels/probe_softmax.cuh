// Softmax over given products and a weighted sum of given values: a warp to 16 queries, in splits that are merged in
// order.
//
// Config: Score (a policy), Tile, kWidth. Params: raw [16 blocks, kv_len], values [kv_len, kWidth], out, lse; mask (or
// null), sinks (or null) [16 blocks]; q_len, kv_len, causal, window, only_new, num_splits; scale, cap, slope.
#pragma once

#include "fi/softmax/columns.cuh"
#include "fi/softmax/online.cuh"
#include "fi/softmax/score.cuh"

namespace fi {

// A 16 x kKeys tile of accumulators whose rows are queries.
struct RowTile {
  using Map = QueriesAsRows;
  static constexpr int kRows = 2, kCount = 16, kKeys = 32, kLanes = 4, kStride = 1;
  static __device__ int query(int row) { return threadIdx.x / 4 + 8 * row; }
  static __device__ int key(int idx) { return idx / 4 * 8 + threadIdx.x % 4 * 2 + idx % 2; }
};

// A 16 x 16 tile whose rows are keys.
struct ColumnTile {
  using Map = QueriesAsColumns;
  static constexpr int kRows = 4, kCount = 8, kKeys = 16, kLanes = 8, kStride = 4;
  static __device__ int query(int row) { return row / 2 * 8 + threadIdx.x % 4 * 2 + row % 2; }
  static __device__ int key(int idx) { return threadIdx.x / 4 + idx / 2 % 2 * 8; }
};

template <class Score, class Params>
__device__ __forceinline__ Score make_score(const Params& params) {
  if constexpr (sizeof(Score) == sizeof(float)) return Score{params.scale};
  else return Score(params.scale, params.cap);
}

template <class Config, class Params>
__device__ __forceinline__ void probe_softmax(const Params& params) {
  using Tile = typename Config::Tile;
  using Map = typename Tile::Map;
  constexpr int kRows = Tile::kRows;
  const int first_query = static_cast<int>(blockIdx.x) * 16;
  const int offset = params.kv_len - params.q_len;
  const ColumnRule rule = {params.causal != 0, params.window};
  const AlibiScore<typename Config::Score> score(make_score<typename Config::Score>(params), params.slope);
  PartialRow whole[kRows];
  float output[kRows][Config::kWidth] = {};
  for (int row = 0; row < kRows; ++row) whole[row] = empty_row();

  const int per_split = (params.kv_len + params.num_splits - 1) / params.num_splits;
  for (int split = 0; split < params.num_splits; ++split) {
    const int stop = min((split + 1) * per_split, params.kv_len);
    OnlineSoftmax<kRows, Tile::kLanes, Tile::kStride> softmax(score.unit());
    float part[kRows][Config::kWidth] = {};
    for (int begin = split * per_split; begin < stop; begin += Tile::kKeys) {
      float scores[Tile::kCount];
#pragma unroll
      for (int idx = 0; idx < Tile::kCount; ++idx) {
        const int query = first_query + Tile::query(Map::row(idx));
        const int key = begin + Tile::key(idx);
        const int position = query_position(query, params.q_len, params.kv_len);
        bool visible = query < params.q_len && key < stop && rule.limits(position, params.kv_len).contains(key);
        if (visible && params.mask != nullptr) {
          const unsigned char* bits = static_cast<const unsigned char*>(params.mask);
          visible = packed_mask_row(bits, params.only_new != 0, query, params.q_len, params.kv_len).visible(key);
        }
        const float raw = key < stop ? static_cast<const float*>(params.raw)[query * params.kv_len + key] : 0.0f;
        scores[idx] = masked(score(raw, static_cast<float>(key - offset - query)), visible);
      }
      float rescale[kRows];
      softmax.template step<Map>(scores, rescale);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int column = 0; column < Config::kWidth; ++column) part[row][column] *= rescale[row];
      }
#pragma unroll
      for (int idx = 0; idx < Tile::kCount; ++idx) {
        const int key = min(begin + Tile::key(idx), params.kv_len - 1);
#pragma unroll
        for (int column = 0; column < Config::kWidth; ++column) {
          const float value = static_cast<const float*>(params.values)[key * Config::kWidth + column];
          part[Map::row(idx)][column] += scores[idx] * value;
        }
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const PartialRow found = softmax.row(row);
#pragma unroll
      for (int column = 0; column < Config::kWidth; ++column) {
        part[row][column] = reduce_over_lanes<Tile::kLanes, Tile::kStride>(part[row][column], Sum());
        if (found.mass == 0.0f) part[row][column] = __int_as_float(0x7fc00000);  // has no effect
      }
      merge_into(whole[row], output[row], found, part[row]);
    }
  }

#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int query = first_query + Tile::query(row);
    const float* sinks = static_cast<const float*>(params.sinks);
    const RowResult result = sinks == nullptr ? finish_row(whole[row]) : finish_row(whole[row], sinks[query]);
    if (query >= params.q_len) continue;
    static_cast<float*>(params.lse)[query] = result.lse;
#pragma unroll
    for (int column = 0; column < Config::kWidth; ++column) {
      static_cast<float*>(params.out)[query * Config::kWidth + column] = output[row][column] * result.scale;
    }
  }
}

}  // namespace fi
