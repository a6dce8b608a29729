"""References of ``rmsnorm`` and ``add_rmsnorm``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import serving_dtype
from .quantised import quantised


def normalized(x: Tensor, weight: Tensor, eps: float, weight_bias: float, compute_dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + weight_bias) over the last dim, in ``compute_dtype``."""
    wide = x.to(compute_dtype)
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return wide * scale * (weight.to(compute_dtype) + weight_bias)


def added(x: Tensor, residual: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """x + residual computed in ``compute_dtype`` and rounded to the residual's dtype."""
    return (x.to(compute_dtype) + residual.to(compute_dtype)).to(residual.dtype)


def stored(normalized: Tensor, scale: float | Tensor | None, dtype: torch.dtype) -> Tensor:
    """A norm as an output of ``dtype`` holds it: FP8 divided by ``scale`` and saturated; others (no scale) rounded."""
    return normalized.to(dtype) if scale is None else quantised(normalized, scale, dtype)


def rmsnorm(
    x: Tensor, weight: Tensor, eps: float, weight_bias: float, scale: float | Tensor | None, out: Tensor
) -> None:
    """The ``RMSNorm`` protocol."""
    out.copy_(stored(normalized(x, weight, eps, weight_bias, serving_dtype(x.dtype)), scale, out.dtype))


def add_rmsnorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    weight_bias: float,
    scale: float | Tensor | None,
    out: Tensor,
) -> None:
    """The ``AddRMSNorm`` protocol."""
    compute_dtype = serving_dtype(x.dtype)
    residual.copy_(added(x, residual, compute_dtype))
    out.copy_(stored(normalized(residual, weight, eps, weight_bias, compute_dtype), scale, out.dtype))
