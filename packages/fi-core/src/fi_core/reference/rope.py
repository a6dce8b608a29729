"""Reference of ``rope``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rope import RopeTable
from . import serving_dtype


def cos_sin_of(positions: Tensor, table: RopeTable, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, rotary_dim / 2] in ``compute_dtype``, attention factor included.

    Rows of the table if there is one; else the angles position * inv_freq in float64, because float32 would lose
    position * 2^-24 radians.
    """
    if table.cos_sin is not None:
        cos, sin = table.cos_sin.index_select(0, positions).to(compute_dtype).chunk(2, dim=1)
        return cos, sin
    angles = torch.outer(positions.double(), table.inv_freq.double())
    factor = table.config.attention_factor
    return (angles.cos() * factor).to(compute_dtype), (angles.sin() * factor).to(compute_dtype)


def apply_rope(x: Tensor, positions: Tensor, table: RopeTable, compute_dtype: torch.dtype) -> Tensor:
    """x [T, H, D] rotated at positions int [T]: a new tensor [T, H, D] in ``compute_dtype``, not yet rounded to x's
    dtype."""
    cos, sin = (part.unsqueeze(1) for part in cos_sin_of(positions, table, compute_dtype))
    rotary_dim = table.config.rotary_dim
    half = rotary_dim // 2
    out = x.to(compute_dtype, copy=True)
    if table.config.pairs == "half":
        first, second = slice(0, half), slice(half, rotary_dim)
    else:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    a, b = x[..., first].to(compute_dtype), x[..., second].to(compute_dtype)
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out


def rope(q: Tensor, k: Tensor | None, positions: Tensor, table: RopeTable, q_out: Tensor, k_out: Tensor | None) -> None:
    """The ``Rope`` protocol: float32 arithmetic (float64 for float64), rounded once."""
    compute_dtype = serving_dtype(q.dtype)
    q_out.copy_(apply_rope(q, positions, table, compute_dtype))
    if k is not None and k_out is not None:
        k_out.copy_(apply_rope(k, positions, table, compute_dtype))
