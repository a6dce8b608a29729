"""Conformance cases of ``rmsnorm``; ``add_rmsnorm`` uses the same shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contract import EXACT, Case, Tolerance, Trial
from ...reference.norms import normalized, stored
from ...tolerances import ROUNDED
from ..quantised_output import OUT_FORMATS
from . import guarded, name_of, normal


@dataclass(frozen=True)
class NormCase:
    """Shape, layout and hostility of one norm case. ``before`` / ``after``: foreign elements around each row;
    ``scale`` multiplies the input; ``zero_row`` makes the first row all zeros. FP8 (``out_format``): divided by
    ``out_scale``, in device memory or not; ``exact``: rows of 1 and -1 and eps 0, so that the norm is the weight, which
    has values of every size, infinities and NaN."""

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
    out_format: str = "same"
    out_scale: float = 0.02
    scale_in_memory: bool = False
    exact: bool = False

    @property
    def tags(self) -> frozenset[str]:
        hostile = self.before or self.scale != 1.0 or self.zero_row or self.shape[-1] % 2 or self.exact
        return frozenset({"hostile"} if hostile else ())

    @property
    def values(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "hidden_size": self.shape[-1], "out_format": self.out_format}

    def input(self, device: torch.device, generator: torch.Generator) -> Tensor:
        x = normal(self.shape, torch.float32, device, generator) * self.scale
        if self.exact:
            x = torch.where(x < 0.0, -1.0, 1.0)
        if self.zero_row:
            x[0] = 0.0
        return x.to(self.dtype)

    def weight(self, device: torch.device, generator: torch.Generator) -> Tensor:
        weight = normal(self.shape[-1:], torch.float32, device, generator)
        if self.exact:
            weight = weight * 2.0 ** torch.linspace(-24.0, 24.0, weight.shape[0], device=device)
            weight[:4] = torch.tensor([math.inf, -math.inf, math.nan, 0.0], device=device)
        return weight.to(self.dtype)

    @property
    def out_dtype(self) -> torch.dtype:
        return OUT_FORMATS[self.out_format] or self.dtype

    @property
    def out_tolerance(self) -> Tolerance:
        return EXACT if self.exact else ROUNDED[self.out_dtype]

    def divisor(self, device: torch.device) -> float | Tensor | None:
        """The kernel's ``scale``."""
        if self.out_format == "same":
            return None
        return torch.full((1,), self.out_scale, device=device) if self.scale_in_memory else self.out_scale

    def expected(self, total: Tensor, weight: Tensor) -> Tensor:
        """The norm of ``total`` as ``out`` holds it: from float64, where it is exact from float32 divided and rounded as
        kernels are to."""
        compute_dtype = torch.float32 if self.exact else torch.float64
        norm = normalized(total, weight, self.eps, self.weight_bias, compute_dtype)
        scale = self.divisor(total.device)
        return norm if scale is None else stored(norm, scale, self.out_dtype)

    def comparable(self, out: Tensor) -> Tensor:
        """What of ``out`` is compared: the bytes where they must be equal, with one byte for every NaN."""
        if not self.exact:
            return out
        return torch.where(out.float().isnan(), 0x7F, out.contiguous().view(torch.uint8).int())


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
    yield from _fp8_cases()


def _fp8_cases() -> Iterator[NormCase]:
    for name in ("fp8_e4m3", "fp8_e5m2"):
        yield NormCase(f"{name}_float", (9, 768), out_format=name)
        yield NormCase(f"{name}_tensor", (9, 768), out_format=name, scale_in_memory=True)
        yield NormCase(f"{name}_saturated", (9, 768), out_format=name, out_scale=1e-6 if name == "fp8_e5m2" else 1e-3)
        yield NormCase(f"{name}_subnormal", (9, 768), out_format=name, out_scale=4096.0 if name == "fp8_e5m2" else 40.0)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            case = NormCase(f"{name}_exact_{name_of(dtype)}", (3, 1024), dtype, out_format=name, exact=True, eps=0.0)
            yield case
            yield replace(case, name=f"{case.name}_tensor", out_scale=0.37, scale_in_memory=True)
    e4m3: dict[str, Any] = {"out_format": "fp8_e4m3"}
    for dtype in (torch.float32, torch.float16, torch.float64):
        yield NormCase(f"fp8_e4m3_{name_of(dtype)}", (5, 576), dtype, **e4m3)
    for hidden_size in (1, 7, 4096, 16384):
        yield NormCase(f"fp8_e4m3_d{hidden_size}", (3, hidden_size), **e4m3)
    yield NormCase("fp8_e4m3_heads_strided", (33, 9, 128), after=128, scale_in_memory=True, **e4m3)
    yield NormCase("fp8_e4m3_rows_unaligned", (17, 511), before=3, after=2, **e4m3)
    yield NormCase("fp8_e4m3_weight_bias", (9, 2304), weight_bias=1.0, scale_in_memory=True, **e4m3)
    yield NormCase("fp8_e4m3_zero_row", (9, 768), zero_row=True, **e4m3)


def _build(case: NormCase, device: torch.device, seed: int) -> Trial:
    generator = torch.Generator().manual_seed(seed)
    content = case.input(device, generator)
    weight = case.weight(device, generator)
    tolerance = {"out": case.out_tolerance, "rest": EXACT, "x": EXACT}
    if case.in_place:
        del tolerance["x"]

    def run(kernel: Any) -> Mapping[str, Tensor]:
        x = guarded(case.shape, case.dtype, device, case.before, case.after, content)
        out = x if case.in_place else guarded(case.shape, case.out_dtype, device, case.before, case.after)
        kernel(x.view, weight, case.eps, case.weight_bias, case.divisor(device), out.view)
        found = {"out": case.comparable(out.view), "rest": out.rest(), "x": x.view}
        return {name: found[name] for name in tolerance}

    def expected() -> Mapping[str, Tensor]:
        out = case.comparable(case.expected(content, weight))
        untouched = guarded(case.shape, case.out_dtype, device, case.before, case.after).rest()
        wanted = {"out": out, "rest": untouched, "x": content}
        return {name: wanted[name] for name in tolerance}

    return Trial(run, expected, tolerance)


def cases() -> Iterator[Case]:
    """Every case of ``rmsnorm``."""
    for case in norm_cases():
        yield Case(case.name, case.values, partial(_build, case), case.tags)
