"""Decode batches large enough for a kernel that gives a tile several KV heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...rope import FusedRope

Lens = tuple[tuple[int, ...], tuple[int, ...]]
"""New tokens and keys of each request."""

_MANY: Lens = ((1, 2) * 32, (900, *range(2, 128, 2)))
_SOME: Lens = ((1, 2, 0, 1) * 8, (500, 4, 0, 133, *range(10, 150, 5)))


def large_batches() -> Iterator[tuple[str, Lens, dict[str, Any]]]:
    """(name, lengths, options of ``case``): pages of few tokens, windows, rotated keys in FP8."""
    four: dict[str, Any] = {"head_dim": 128, "heads": (16, 4)}
    eight: dict[str, Any] = {"head_dim": 64, "heads": (16, 8), "dtype": torch.bfloat16}
    yield "many_slots", _MANY, {**four, "dtype": torch.bfloat16, "features": {"lse"}, "page_size": 1}
    yield (
        "many_slots_of_rows",
        _MANY,
        {**four, "dtype": torch.float16, "features": {"sinks"}, "page_size": 5, "table_row": True},
    )
    yield "many_windows", _SOME, {**eight, "features": {"sinks", "lse"}, "windows": (100,)}
    rotated = {"kv_format": "fp8_e4m3", "scale": "heads", "rope": FusedRope(64, keys=True)}
    yield "many_fp8_rotated", _SOME, {**eight, **rotated, "kv_layout": "HND"}
