// Tensors of 2 or 3 dims as rows: [rows, width] or [outer, inner, width] with any strides between rows.
#pragma once

#include "fi/tile/host_device.cuh"
#include "fi/tile/pack.cuh"

namespace fi {

// Strides in elements between consecutive outer and inner indices; the last dim is contiguous.
struct RowStrides {
  int64 outer;
  int64 inner;
};

__device__ __forceinline__ int64 row_offset(int64 row, int inner_size, RowStrides strides) {
  return inner_size == 1 ? row * strides.outer : row / inner_size * strides.outer + row % inner_size * strides.inner;
}

}  // namespace fi
