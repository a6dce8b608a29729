"""Row-wise kernels see tensors of 2 or 3 dims as rows (outer, inner): how a row index becomes an offset."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row_offset(row, inner_size, outer_stride, inner_stride):
    """Offset in elements (int64) of row ``row`` of a tensor [outer, inner_size, width]."""
    row = row.to(tl.int64)
    return (row // inner_size) * outer_stride + (row % inner_size) * inner_stride


def row_layout(tensor: Tensor) -> tuple[int, int, int]:
    """(inner_size, outer_stride, inner_stride) of a [rows, width] or [outer, inner, width] tensor."""
    if tensor.dim() == 2:
        return 1, tensor.stride(0), 0
    return tensor.shape[1], tensor.stride(0), tensor.stride(1)


def num_rows(tensor: Tensor) -> int:
    """Rows of a [rows, width] or [outer, inner, width] tensor."""
    return tensor.shape[:-1].numel()
