"""Conformance cases of ``rmsnorm``; ``add_rmsnorm`` uses the same shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contract import EXACT, Case, Trial
from ...reference.norms import normalized
from ...tolerances import ROUNDED
from . import guarded, name_of, normal


@dataclass(frozen=True)
class NormCase:
    """Shape, layout and hostility of one norm case. ``before`` / ``after``: foreign elements around each row;
    ``scale`` multiplies the input; ``zero_row`` makes the first row all zeros."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    before: int = 0
    after: int = 0
    eps: float = 1e-6
    weight_bias: float = 0.0
    scale: float = 1.0
    in_place: bool = False
    zero_row: bool = False

    @property
    def tags(self) -> frozenset[str]:
        hostile = self.before or self.scale != 1.0 or self.zero_row or self.shape[-1] % 2
        return frozenset({"hostile"} if hostile else ())

    @property
    def values(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "hidden_size": self.shape[-1]}

    def input(self, device: torch.device, generator: torch.Generator) -> Tensor:
        x = normal(self.shape, torch.float32, device, generator) * self.scale
        if self.zero_row:
            x[0] = 0.0
        return x.to(self.dtype)


def norm_cases() -> Iterator[NormCase]:
    """The cases, cheap ones first."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        yield NormCase(f"plain_{name_of(dtype)}", (5, 576), dtype)
    for hidden_size in (1, 7, 64, 128, 1000, 2049, 4096, 5120, 8192, 16384):
        yield NormCase(f"d{hidden_size}", (3, hidden_size))
    yield NormCase("one_row", (1, 4096))
    yield NormCase("many_rows", (1031, 128))
    yield NormCase("heads", (33, 9, 128))
    yield NormCase("heads_strided", (33, 9, 64), after=64)
    yield NormCase("rows_strided", (17, 512), after=40)
    yield NormCase("rows_unaligned", (17, 511), before=3, after=2)
    yield NormCase("in_place", (9, 768), in_place=True)
    yield NormCase("in_place_heads_strided", (9, 5, 128), after=256, in_place=True)
    yield NormCase("weight_bias", (9, 2304), weight_bias=1.0)
    yield NormCase("weight_bias_fp32", (9, 2304), torch.float32, weight_bias=1.0)
    yield NormCase("eps_large", (9, 256), eps=0.5)
    yield NormCase("zero_row", (4, 256), zero_row=True)
    yield NormCase("zero_row_eps_tiny", (4, 256), torch.float32, zero_row=True, eps=1e-20)
    yield NormCase("tiny_values", (4, 1024), torch.float32, scale=1e-12)
    yield NormCase("large_values_fp16", (4, 1024), torch.float16, scale=6000.0)
    yield NormCase("large_values_bf16", (4, 8192), torch.bfloat16, scale=1e6)


def _build(case: NormCase, device: torch.device, seed: int) -> Trial:
    generator = torch.Generator().manual_seed(seed)
    content = case.input(device, generator)
    weight = normal(case.shape[-1:], case.dtype, device, generator)
    tolerance = {"out": ROUNDED[case.dtype], "rest": EXACT, "x": EXACT}
    if case.in_place:
        del tolerance["x"]

    def run(kernel: Any) -> Mapping[str, Tensor]:
        x = guarded(case.shape, case.dtype, device, case.before, case.after, content)
        out = x if case.in_place else guarded(case.shape, case.dtype, device, case.before, case.after)
        kernel(x.view, weight, case.eps, case.weight_bias, out.view)
        found = {"out": out.view, "rest": out.rest(), "x": x.view}
        return {name: found[name] for name in tolerance}

    def expected() -> Mapping[str, Tensor]:
        out = normalized(content, weight, case.eps, case.weight_bias, torch.float64)
        untouched = guarded(case.shape, case.dtype, device, case.before, case.after).rest()
        wanted = {"out": out, "rest": untouched, "x": content}
        return {name: wanted[name] for name in tolerance}

    return Trial(run, expected, tolerance)


def cases() -> Iterator[Case]:
    """Every case of ``rmsnorm``."""
    for case in norm_cases():
        yield Case(case.name, case.values, partial(_build, case), case.tags)
