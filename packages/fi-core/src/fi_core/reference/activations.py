"""References of ``silu_mul`` and ``gelu_mul``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from . import serving_dtype


def gated_silu(x: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """silu(gate) * up of x [..., 2 * width] in ``compute_dtype``."""
    gate, up = x.to(compute_dtype).chunk(2, dim=-1)
    return functional.silu(gate) * up


def gated_gelu(x: Tensor, approximate: str, compute_dtype: torch.dtype) -> Tensor:
    """gelu(gate) * up of x [..., 2 * width] in ``compute_dtype``."""
    gate, up = x.to(compute_dtype).chunk(2, dim=-1)
    return functional.gelu(gate, approximate=approximate) * up


def silu_mul(x: Tensor, approximate: str, out: Tensor) -> None:
    """The ``GatedActivation`` protocol of ``silu_mul`` (``approximate`` is "none")."""
    assert approximate == "none", approximate
    out.copy_(gated_silu(x, serving_dtype(x.dtype)))


def gelu_mul(x: Tensor, approximate: str, out: Tensor) -> None:
    """The ``GatedActivation`` protocol of ``gelu_mul``."""
    out.copy_(gated_gelu(x, approximate, serving_dtype(x.dtype)))
