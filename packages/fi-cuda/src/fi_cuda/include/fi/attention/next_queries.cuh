// Query rows of the next item, copied into shared memory while the present one is attended to, so that an item's end waits for no
// load of global memory.
#pragma once

#include "fi/attention/item.cuh"
#include "fi/ptx/cp_async.cuh"
#include "fi/ptx/mbarrier.cuh"

namespace fi {

// Two places that items take in turns. Copies for an item may start once no thread reads those of the item before the last.
template <class Config>
struct NextQueries {
  static constexpr int kUnits = Config::kHeadDim * static_cast<int>(sizeof(typename Config::Query)) / 16;  // of a row
  static constexpr int kPitch = (kUnits + 1) * 16;  // lanes that read neighbouring rows then differ in bank
  static constexpr int kBytes = Config::kQueriesAhead ? 2 * Config::kRows * kPitch + 16 : 0;

  unsigned char* shared;  // two places, then two barriers
  int num_requested;

  __device__ __forceinline__ unsigned long long* barrier(int number) const {
    return reinterpret_cast<unsigned long long*>(shared + 2 * Config::kRows * kPitch) + number % 2;
  }
  __device__ __forceinline__ unsigned char* place(int number) const { return shared + number % 2 * (Config::kRows * kPitch); }

  // Called by one thread.
  __device__ __forceinline__ void init() const {
    for (int number = 0; number < 2; ++number) ptx::init_barrier(barrier(number), Config::kNumThreads);
  }

  // Called by all threads of the block.
  template <class Params>
  __device__ __forceinline__ void request(const Params& params, const AttentionItem& item) {
    using Query = typename Config::Query;
    const int first_row = item.q_tile * Config::kRows;
    const int num_rows = min(item.q_len * Config::kGroupSize - first_row, Config::kRows);
#pragma unroll 1
    for (int unit = static_cast<int>(threadIdx.x); unit < num_rows * kUnits; unit += Config::kNumThreads) {
      const int row = static_cast<int>(static_cast<unsigned>(unit) / kUnits), byte = unit % kUnits * 16;
      const int token = (first_row + row) / Config::kGroupSize, head = (first_row + row) % Config::kGroupSize;
      const Query* q = static_cast<const Query*>(params.q) + (item.q_begin + token) * params.q_stride_token +
                       (item.kv_head * Config::kGroupSize + head) * params.q_stride_head;
      ptx::cp_async_16(place(num_requested) + row * kPitch + byte, reinterpret_cast<const unsigned char*>(q) + byte, true);
    }
    ptx::cp_async_arrive_noinc(barrier(num_requested));
    ++num_requested;
  }

  // Row 0 of the tile requested last, once all of its rows are there.
  __device__ __forceinline__ const unsigned char* wait() const {
    const int number = num_requested - 1;
    ptx::wait_barrier(barrier(number), static_cast<unsigned>(number) / 2 % 2);
    return place(number);
  }
};

}  // namespace fi
