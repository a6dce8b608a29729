"""Conformance cases of ``silu_mul``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ...contract import Case
from ...reference.activations import gated_silu
from .activations import build_cases


def cases() -> Iterator[Case]:
    """Every case of ``silu_mul``."""
    return build_cases("none", partial(gated_silu, compute_dtype=torch.float64), "", {})
