"""Conformance cases of ``add_rmsnorm``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contract import EXACT, Case, Trial
from ...reference.norms import added
from . import guarded
from .rmsnorm import NormCase, norm_cases


def _build(case: NormCase, device: torch.device, seed: int) -> Trial:
    generator = torch.Generator().manual_seed(seed)
    content, stream = case.input(device, generator), case.input(device, generator)
    if case.exact:
        stream = torch.zeros_like(content)
    weight = case.weight(device, generator)
    tolerance = {"out": case.out_tolerance, "residual": EXACT, "out_rest": EXACT, "residual_rest": EXACT}
    if not case.in_place:
        tolerance["x"] = EXACT

    def buffer(filled: Tensor | None = None, dtype: torch.dtype = case.dtype) -> Any:
        return guarded(case.shape, dtype, device, case.before, case.after, filled)

    def run(kernel: Any) -> Mapping[str, Tensor]:
        x, residual = buffer(content), buffer(stream)
        out = x if case.in_place else buffer(dtype=case.out_dtype)
        kernel(x.view, residual.view, weight, case.eps, case.weight_bias, case.divisor(device), out.view)
        found = {"out": case.comparable(out.view), "residual": residual.view}
        found |= {"out_rest": out.rest(), "residual_rest": residual.rest()}
        return {**found, "x": x.view} if not case.in_place else found

    def expected() -> Mapping[str, Tensor]:
        total = added(content, stream, torch.float64)
        out_rest = buffer(dtype=case.out_dtype).rest()
        wanted = {"out": case.comparable(case.expected(total, weight)), "residual": total}
        wanted |= {"out_rest": out_rest, "residual_rest": buffer().rest()}
        return {**wanted, "x": content} if not case.in_place else wanted

    return Trial(run, expected, tolerance)


def cases() -> Iterator[Case]:
    """Every case of ``add_rmsnorm``: the shapes of ``rmsnorm``, in place meaning that ``out`` is x.

    The residual must be exact: an addition in a format of at least 2 p + 2 bits, rounded again to p bits, is the
    correctly rounded sum (Figueroa, 1995), so float32 arithmetic leaves no freedom for float16 and bfloat16.
    """
    for case in norm_cases():
        yield Case(case.name, case.values, partial(_build, case), case.tags)
