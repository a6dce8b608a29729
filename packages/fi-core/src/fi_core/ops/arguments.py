"""Argument checks that the public functions share; each failure names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, LayoutError

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes of activations that the contracts allow."""


def check_float(argument: str, tensor: Tensor) -> None:
    """Raise ArgumentError unless ``tensor`` has a dtype of FLOAT_DTYPES, at least one dim and a contiguous last dim."""
    if not isinstance(tensor, Tensor):
        raise ArgumentError(argument, "a tensor", type(tensor).__name__)
    if tensor.dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"{argument}.dtype", "float32, float16, bfloat16 or float64", tensor.dtype)
    shape = tensor.shape
    if not shape:
        raise ArgumentError(argument, "at least one dim", "a scalar")
    if shape[-1] == 0:
        raise ArgumentError(argument, "a last dim of at least 1", tuple(shape))
    check_last_dim(argument, tensor)


def check_last_dim(argument: str, tensor: Tensor) -> None:
    """Raise LayoutError unless the last dim of ``tensor`` (one dim or more) is contiguous."""
    strides = tensor.stride()
    if strides[-1] != 1 and tensor.shape[-1] > 1:
        raise LayoutError(argument, "a contiguous last dim", f"strides {strides}")


def check_writable(argument: str, tensor: Tensor) -> None:
    """Raise ArgumentError for an expanded tensor: elements that share memory cannot be written each on its own."""
    strides = tensor.stride()
    if 0 in strides and any(extent > 1 and stride == 0 for extent, stride in zip(tensor.shape, strides, strict=True)):
        raise ArgumentError(argument, "memory of its own for each element", f"an expanded tensor, strides {strides}")


def check_like(
    argument: str, tensor: Tensor, model: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None
) -> None:
    """Raise ArgumentError unless ``tensor`` has ``dtype`` (default: ``model``'s), ``model``'s device, ``shape``, and a
    contiguous last dim."""
    dtype = model.dtype if dtype is None else dtype
    if not isinstance(tensor, Tensor):
        raise ArgumentError(argument, "a tensor", type(tensor).__name__)
    if tensor.dtype != dtype:
        raise ArgumentError(f"{argument}.dtype", str(dtype), tensor.dtype)
    if tensor.device != model.device:
        raise ArgumentError(f"{argument}.device", str(model.device), tensor.device)
    if tuple(tensor.shape) != tuple(shape):
        raise ArgumentError(argument, f"shape {tuple(shape)}", tuple(tensor.shape))
    check_last_dim(argument, tensor)


def output_like(argument: str, out: Tensor | None, model: Tensor, shape: Sequence[int]) -> Tensor:
    """``out`` after ``check_like`` and ``check_writable``, or a new contiguous tensor when it is None."""
    if out is None:
        return torch.empty(tuple(shape), dtype=model.dtype, device=model.device)
    check_like(argument, out, model, shape)
    check_writable(argument, out)
    return out


def as_rows(argument: str, tensor: Tensor) -> Tensor:
    """``tensor`` as a view of 2 or 3 dims ([N, D] or [N, H, D]), the ranks that kernels of row-wise operations see."""
    if tensor.dim() in (2, 3):
        return tensor
    if tensor.dim() == 1:
        return tensor.unsqueeze(0)
    try:
        return tensor.view(tensor.shape[:-2].numel(), *tensor.shape[-2:])
    except RuntimeError as error:
        expected = "leading dims that collapse into one without a copy (beyond the last two)"
        raise ArgumentError(argument, expected, f"shape {tuple(tensor.shape)}, strides {tensor.stride()}") from error


def call_checked(kernel: Callable[..., None], arguments: tuple[Any, ...], check: Callable[[], None]) -> None:
    """Call ``kernel``; when torch finds an index out of range on a CPU, ``check`` is to name it as an IndexCheckError."""
    try:
        kernel(*arguments)
    except IndexError:
        check()
        raise
