"""Reference implementations in torch: the oracle with compute_dtype=float64, the CPU backend with float32."""

from __future__ import annotations

import torch


def serving_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the reference computes when it serves tensors of ``dtype``: float64 for float64, else
    float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
