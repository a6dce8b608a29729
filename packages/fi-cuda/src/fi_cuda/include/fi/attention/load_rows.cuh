// Copies of a chunk's rows by cp.async, 16 bytes a lane: any page size, table form and strides. sm_80.
#pragma once

#include "fi/attention/stage.cuh"
#include "fi/attention/walk.cuh"
#include "fi/ptx/cp_async.cuh"

namespace fi {

template <class Config, class Params>
class RowLoader {
  using Stored = typename Config::Stored;
  using Stage = ChunkStage<Config>;
  using Lookup = PageLookup<Config>;
  using Walk = ChunkWalk<Config, Params>;
  static constexpr bool kPaged = Config::kTable != kRagged;
  static constexpr int kTokens = Config::kChunkTokens;

 public:
  static constexpr int kArrivals = 32;          // a stage's barrier counts each lane's
  static constexpr bool kZeroesUnread = true;  // rows that are not readable become zeros

  __device__ __forceinline__ explicit RowLoader(const Params& params) : params_(params) {}

  // Starts the copies of the walk's chunk; `barrier` completes a phase when they have landed.
  __device__ __forceinline__ void load(const Walk& walk, unsigned char* stage, unsigned long long* barrier) const {
    if (walk.all_readable(walk.begin(), kTokens)) {
      load_chunk<true>(walk, stage);
    } else {
      load_chunk<false>(walk, stage);
    }
    ptx::cp_async_arrive_noinc(barrier);
  }

 private:
  template <bool kWhole>
  __device__ __forceinline__ void load_chunk(const Walk& walk, unsigned char* stage) const {
    const Stored* keys = static_cast<const Stored*>(params_.k) + walk.kv_head() * params_.k_stride_head;
    const Stored* values = static_cast<const Stored*>(params_.v) + walk.kv_head() * params_.v_stride_head;
    load_rows<Stage::kKeyBytes, typename Stage::Keys, kWhole>(walk, stage, keys, params_.k_stride_page, params_.k_stride_token);
    load_rows<Stage::kValueBytes, typename Stage::Values, kWhole>(walk, stage + Stage::kValueBegin, values,
                                                                  params_.v_stride_page, params_.v_stride_token);
  }

  // As many whole rows at once as a warp has lanes for.
  template <int kRowBytes, class Rows, bool kWhole>
  __device__ __forceinline__ void load_rows(const Walk& walk, unsigned char* to, const Stored* head, int64 stride_page,
                                            int64 stride_token) const {
    constexpr int kUnits = kRowBytes / 16;
    static_assert(kUnits <= 32, "a row is moved by at most a warp");
    constexpr int kRowsAtOnce = 32 / kUnits;
    constexpr int kRounds = (kTokens + kRowsAtOnce - 1) / kRowsAtOnce;
    // Rows of a round lie in one page, and following rounds of an entry follow in memory.
    constexpr bool kOneEntry = Lookup::kWholePages && Lookup::kEntryTokens % kRowsAtOnce == 0;
    const int lane_row = walk.lane() / kUnits, byte = walk.lane() % kUnits * 16;
    const unsigned char* from = nullptr;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int first_row = round * kRowsAtOnce, row = first_row + lane_row, position = walk.begin() + row;
      const bool follows = kPaged ? kOneEntry && first_row % Lookup::kEntryTokens != 0 : round != 0;
      if (follows) {
        from += kRowsAtOnce * stride_token * static_cast<int>(sizeof(Stored));
      } else {
        int64 offset;
        if constexpr (kPaged) {
          const int page = walk.page_of(kOneEntry ? first_row : row % kTokens);
          offset = page * stride_page + position % Config::kPageSize * stride_token;
        } else {
          offset = (walk.first_row() + position) * stride_token;
        }
        from = reinterpret_cast<const unsigned char*>(head + offset) + byte;
      }
      const bool mine = (32 % kUnits == 0 || lane_row < kRowsAtOnce) && (kTokens % kRowsAtOnce == 0 || row < kTokens);
      if (mine) ptx::cp_async_16(to + Rows::place(row, byte), from, kWhole || walk.all_readable(position, 1));
    }
  }

  const Params& params_;
};

}  // namespace fi
