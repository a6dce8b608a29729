"""Argument checks that the public functions share; each failure names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes of activations that the contracts allow."""


def check_float(argument: str, tensor: Tensor) -> None:
    """Raise ArgumentError unless ``tensor`` has a dtype of FLOAT_DTYPES, at least one dim and a contiguous last dim."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"{argument}.dtype", "float32, float16, bfloat16 or float64", tensor.dtype)
    if tensor.dim() == 0:
        raise ArgumentError(argument, "at least one dim", "a scalar")
    if tensor.shape[-1] == 0:
        raise ArgumentError(argument, "a last dim of at least 1", tuple(tensor.shape))
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ArgumentError(argument, "a contiguous last dim", f"strides {tensor.stride()}")


def check_like(argument: str, tensor: Tensor, model: Tensor, shape: Sequence[int]) -> None:
    """Raise ArgumentError unless ``tensor`` has ``model``'s dtype and device, ``shape``, and a contiguous last dim."""
    if tensor.dtype != model.dtype:
        raise ArgumentError(f"{argument}.dtype", str(model.dtype), tensor.dtype)
    if tensor.device != model.device:
        raise ArgumentError(f"{argument}.device", str(model.device), tensor.device)
    if tuple(tensor.shape) != tuple(shape):
        raise ArgumentError(argument, f"shape {tuple(shape)}", tuple(tensor.shape))
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ArgumentError(argument, "a contiguous last dim", f"strides {tensor.stride()}")


def output_like(argument: str, out: Tensor | None, model: Tensor, shape: Sequence[int]) -> Tensor:
    """``out`` after ``check_like``, or a new contiguous tensor when it is None."""
    if out is None:
        return torch.empty(tuple(shape), dtype=model.dtype, device=model.device)
    check_like(argument, out, model, shape)
    return out


def as_rows(argument: str, tensor: Tensor) -> Tensor:
    """``tensor`` as a view of 2 or 3 dims ([N, D] or [N, H, D]), the ranks that kernels of row-wise operations see."""
    if tensor.dim() in (2, 3):
        return tensor
    if tensor.dim() == 1:
        return tensor.unsqueeze(0)
    try:
        return tensor.view(-1, *tensor.shape[-2:])
    except RuntimeError as error:
        expected = "leading dims that collapse into one without a copy (beyond the last two)"
        raise ArgumentError(argument, expected, f"shape {tuple(tensor.shape)}, strides {tensor.stride()}") from error
