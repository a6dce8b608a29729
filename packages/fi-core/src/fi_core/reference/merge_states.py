"""Reference of ``merge_states``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import serving_dtype


def merge(o: Tensor, lse: Tensor, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(o [T, H, D], lse [T, H]) of states o [N, T, H, D] and lse [N, T, H], in ``compute_dtype``."""
    exponents = lse.to(compute_dtype)
    if o.shape[0] == 0:
        return o.new_zeros(o.shape[1:], dtype=compute_dtype), exponents.new_full(lse.shape[1:], -math.inf)
    log_sum = torch.logsumexp(exponents, dim=0)
    weights = torch.exp(exponents - torch.where(log_sum == -math.inf, 0.0, log_sum)).unsqueeze(-1)
    # An empty state's o may be uninitialised memory: 0 * NaN must not reach the sum.
    values = torch.where(weights == 0.0, 0.0, o.to(compute_dtype))
    return (weights * values).sum(dim=0), log_sum


def merge_states(o: Tensor, lse: Tensor, o_out: Tensor, lse_out: Tensor) -> None:
    """The ``MergeStates`` protocol, in float32 (float64 for float64)."""
    values, log_sum = merge(o, lse, serving_dtype(o.dtype))
    o_out.copy_(values)
    lse_out.copy_(log_sum)
