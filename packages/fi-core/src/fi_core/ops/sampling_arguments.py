"""Argument checks and record flattening that the sampling operations share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..sampling import DrawKeys, FilterParams
from .arguments import check_float, check_last_dim, check_writable

MAX_VOCAB = 2**19
"""Most tokens of a vocabulary: each has at most 2^32 of mass, and products with the total must fit 62 bits."""

_FILTER_DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "typical_p": torch.float32,
}
_KEY_DTYPES = {"seed": torch.int64, "sample": torch.int32, "position": torch.int64}

FILTER_SCHEMA = ", ".join(f"Tensor? {name}" for name in _FILTER_DTYPES) + ", str order"
"""Torch schema of a flattened FilterParams."""
KEY_SCHEMA = ", ".join(f"Tensor {name}" for name in _KEY_DTYPES)
"""Torch schema of a flattened DrawKeys."""
NUM_FILTER_ARGUMENTS = len(_FILTER_DTYPES) + 1


def check_logits(argument: str, logits: Tensor) -> None:
    """Raise ArgumentError unless ``logits`` is a floating [rows, V] with a contiguous last dim and 1 <= V <=
    MAX_VOCAB."""
    if logits.dim() != 2:
        raise ArgumentError(argument, "shape [rows, vocabulary]", tuple(logits.shape))
    check_float(argument, logits)
    if logits.shape[1] > MAX_VOCAB:
        raise ArgumentError(argument, f"a vocabulary of at most {MAX_VOCAB}", logits.shape[1])


def check_tensor(argument: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> None:
    """Raise ArgumentError unless ``tensor`` has exactly this dtype, shape and device and a contiguous last dim."""
    if not isinstance(tensor, Tensor):
        raise ArgumentError(argument, f"a tensor of {dtype}", type(tensor).__name__)
    if tensor.dtype != dtype:
        raise ArgumentError(f"{argument}.dtype", str(dtype), tensor.dtype)
    if tensor.device != device:
        raise ArgumentError(f"{argument}.device", str(device), tensor.device)
    if tuple(tensor.shape) != tuple(shape):
        raise ArgumentError(argument, f"shape {tuple(shape)}", tuple(tensor.shape))
    check_last_dim(argument, tensor)


def tensor_or_new(
    argument: str, given: Tensor | None, dtype: torch.dtype, shape: Sequence[int], device: torch.device
) -> Tensor:
    """``given`` after ``check_tensor`` and ``check_writable``, or a new tensor when it is None."""
    if given is None:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    check_tensor(argument, given, dtype, shape, device)
    check_writable(argument, given)
    return given


def check_filters(filters: FilterParams, num_rows: int, device: torch.device, slots: Tensor | None = None) -> None:
    """Raise ArgumentError unless every column of ``filters`` has one value a row (with ``slots``: one dim) and the order
    is known."""
    for name, dtype in _FILTER_DTYPES.items():
        column = getattr(filters, name)
        if column is not None:
            _check_column(f"filters.{name}", column, dtype, num_rows if slots is None else None, device)
    if filters.order not in ("sequential", "joint"):
        raise ArgumentError("filters.order", "'sequential' or 'joint'", filters.order)


def check_keys(keys: DrawKeys, num_rows: int, device: torch.device, slots: Tensor | None = None) -> None:
    """Raise ArgumentError unless every column of ``keys`` has one value a row; with ``slots``, only ``position``."""
    for name, dtype in _KEY_DTYPES.items():
        free = slots is not None and name != "position"
        _check_column(f"keys.{name}", getattr(keys, name), dtype, None if free else num_rows, device)


def _check_column(
    argument: str, column: Tensor, dtype: torch.dtype, num_rows: int | None, device: torch.device
) -> None:
    if num_rows is None and isinstance(column, Tensor) and column.dim() == 1:
        num_rows = column.shape[0]
    check_tensor(argument, column, dtype, (num_rows or 0,), device)


def flat_filters(filters: FilterParams) -> tuple[Tensor | str | None, ...]:
    """``filters`` in the order of FILTER_SCHEMA."""
    return (*(getattr(filters, name) for name in _FILTER_DTYPES), filters.order)


def flat_keys(keys: DrawKeys) -> tuple[Tensor, ...]:
    """``keys`` in the order of KEY_SCHEMA."""
    return (keys.seed, keys.sample, keys.position)
