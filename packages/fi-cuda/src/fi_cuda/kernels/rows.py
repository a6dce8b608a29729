"""What row-wise kernels share: widest vector that addresses allow, row strides, threads a row."""

from __future__ import annotations

from torch import Tensor


def vector_bytes(*tensors: Tensor, multiple_of: int) -> int:
    """Bytes of the widest load (16 or less, a power of 2) to which base, strides and ``multiple_of`` elements align."""
    elements, together = multiple_of, 16
    for tensor in tensors:
        together |= tensor.data_ptr()
        for stride in tensor.stride()[:-1]:
            elements |= stride
    together |= elements * tensors[0].element_size()
    return together & -together


def row_strides(tensor: Tensor) -> tuple[int, int]:
    """(outer, inner) stride in elements of a [rows, width] or [outer, inner, width] tensor."""
    return (tensor.stride(0), 0) if tensor.dim() == 2 else (tensor.stride(0), tensor.stride(1))


def inner_size(tensor: Tensor) -> int:
    """Rows of the inner dim: 1 for two dims."""
    return 1 if tensor.dim() == 2 else tensor.shape[1]


def num_rows(tensor: Tensor) -> int:
    """Rows of a [rows, width] or [outer, inner, width] tensor."""
    return tensor.shape[:-1].numel()


def power_of_2_at_least(number: int) -> int:
    return 1 << (number - 1).bit_length()
