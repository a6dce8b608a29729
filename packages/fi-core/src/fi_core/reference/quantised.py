"""Reference of FP8 quantisation (Micikevicius et al., 2022, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor


def quantised(x: Tensor, scale: float | Tensor | None, dtype: torch.dtype) -> Tensor:
    """x / scale (a float32 number, or a tensor that broadcasts; None: 1) in x's dtype, saturated to the largest finite
    value of the FP8 ``dtype`` and rounded to nearest even; NaN stays NaN."""
    if isinstance(scale, Tensor):
        x = x / scale.to(x.dtype)
    elif scale is not None:
        x = x / torch.tensor(scale, dtype=torch.float32).to(x)
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)
