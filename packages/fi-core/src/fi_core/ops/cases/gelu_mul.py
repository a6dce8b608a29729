"""Conformance cases of ``gelu_mul``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ...contract import Case
from ...reference.activations import gated_gelu
from .activations import build_cases


def cases() -> Iterator[Case]:
    """Every case of ``gelu_mul``, with both formulas."""
    for approximate in ("tanh", "none"):
        oracle = partial(gated_gelu, approximate=approximate, compute_dtype=torch.float64)
        yield from build_cases(approximate, oracle, f"_{approximate}", {"approximate": approximate})
