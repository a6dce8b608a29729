"""Conformance cases that ``silu_mul`` and ``gelu_mul`` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contract import EXACT, Case, Trial
from ...tolerances import ROUNDED
from . import guarded, name_of, normal

Oracle = Callable[[Tensor], Tensor]
"""x [..., 2 * width] -> float64 [..., width]."""


@dataclass(frozen=True)
class GateCase:
    """Shape ([..., width]), layout and range of one gated-activation case; ``pad`` foreign elements around each row."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    pad: int = 0
    scale: float = 1.0

    @property
    def tags(self) -> frozenset[str]:
        return frozenset({"hostile"} if self.scale != 1.0 or self.shape[-1] % 2 or self.pad % 2 else ())


def gate_cases() -> Iterator[GateCase]:
    """The cases, cheap ones first."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        yield GateCase(f"plain_{name_of(dtype)}", (5, 1536), dtype)
    for width in (1, 7, 64, 1000, 4099, 14336):
        yield GateCase(f"w{width}", (3, width))
    yield GateCase("one_row", (1, 14336))
    yield GateCase("many_rows", (517, 64))
    yield GateCase("three_dims", (4, 5, 96))
    yield GateCase("three_dims_strided", (4, 5, 96), pad=32)
    yield GateCase("rows_strided", (9, 512), pad=24)
    yield GateCase("rows_unaligned", (9, 511), pad=3)
    yield GateCase("saturated_fp32", (4, 512), torch.float32, scale=120.0)
    yield GateCase("saturated_bf16", (4, 512), scale=120.0)
    yield GateCase("saturated_fp16", (4, 512), torch.float16, scale=40.0)
    yield GateCase("tiny_fp32", (4, 512), torch.float32, scale=1e-15)


def _build(case: GateCase, approximate: str, oracle: Oracle, device: torch.device, seed: int) -> Trial:
    generator = torch.Generator().manual_seed(seed)
    full = (*case.shape[:-1], 2 * case.shape[-1])
    content = (normal(full, torch.float32, device, generator) * case.scale).to(case.dtype)

    def run(kernel: Any) -> Mapping[str, Tensor]:
        x = guarded(full, case.dtype, device, case.pad, case.pad, content)
        out = guarded(case.shape, case.dtype, device, case.pad, case.pad)
        kernel(x.view, approximate, out.view)
        return {"out": out.view, "rest": out.rest(), "x": x.view}

    def expected() -> Mapping[str, Tensor]:
        untouched = guarded(case.shape, case.dtype, device, case.pad, case.pad).rest()
        return {"out": oracle(content), "rest": untouched, "x": content}

    return Trial(run, expected, {"out": ROUNDED[case.dtype], "rest": EXACT, "x": EXACT})


def build_cases(approximate: str, oracle: Oracle, suffix: str, fields: Mapping[str, str]) -> Iterator[Case]:
    """Every case with an operation's ``approximate`` and oracle; ``fields`` are request values besides dtype and
    width."""
    for case in gate_cases():
        values = {"dtype": case.dtype, "width": case.shape[-1], **fields}
        yield Case(case.name + suffix, values, partial(_build, case, approximate, oracle), case.tags)
