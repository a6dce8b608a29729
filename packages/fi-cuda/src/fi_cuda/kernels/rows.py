"""What row-wise kernels share: widest vector that addresses allow, row strides, threads a row, the form of a launch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..launch import LaunchableKernel


class LaunchForm(NamedTuple):
    """What launches with tensors of one form (dtypes, shapes, strides and alignment) share: the kernel, its blocks, and the
    strides and sizes among its parameters. Found once for a form, so that a launch computes none of it."""

    kernel: LaunchableKernel
    num_blocks: int
    sizes: tuple[int, ...]


def vector_bytes(*tensors: Tensor, multiple_of: int) -> int:
    """Bytes of the widest load (16 or less, a power of 2) to which base, strides and ``multiple_of`` elements align."""
    address = 0
    for tensor in tensors:
        address |= tensor.data_ptr()
    return aligned_bytes(address, [tensor.stride() for tensor in tensors], multiple_of, tensors[0].element_size())


def aligned_bytes(address: int, strides: Iterable[Sequence[int]], multiple_of: int, element_size: int) -> int:
    """The same for tensors by their strides and by ``address``, the bits that occur in their addresses."""
    elements = multiple_of
    for each in strides:
        for stride in each[:-1]:
            elements |= stride
    together = 16 | address | elements * element_size
    return together & -together


def row_strides(strides: Sequence[int]) -> tuple[int, int]:
    """(outer, inner) of a [rows, width] or [outer, inner, width] tensor's strides in elements."""
    return strides[0], 0 if len(strides) == 2 else strides[1]


def inner_size(shape: Sequence[int]) -> int:
    """Rows of the inner dim: 1 for two dims."""
    return 1 if len(shape) == 2 else shape[1]


def power_of_2_at_least(number: int) -> int:
    return 1 << (number - 1).bit_length()
