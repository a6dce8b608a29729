// Where a request's keys and values are found: its row of the page table, or its first row of ragged ones.
#pragma once

#include "fi/attention/prefill_tiles.cuh"

namespace fi {

template <class Config, class Params>
struct RequestTable {
  const int* entries = nullptr;
  int first_row = 0;

  RequestTable() = default;
  __device__ __forceinline__ RequestTable(const Params& params, int request) {
    if constexpr (Config::kTable == kDense) {
      int row = request;
      if constexpr (Config::kTableRow) row = static_cast<const int*>(params.table_row)[row];
      entries = static_cast<const int*>(params.table) + row * params.table_stride;
    } else {
      first_row = static_cast<const int*>(params.kv_indptr)[request];
      if constexpr (Config::kTable == kIndptr) entries = static_cast<const int*>(params.table) + first_row;
    }
  }
};

}  // namespace fi
