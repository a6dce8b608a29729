"""Conformance cases of ``merge_states``."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...contract import Case, Trial
from ...protocols import MergeStates
from ...reference.merge_states import merge
from ...tolerances import attention_tolerance, lse_tolerance


def _case(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, empty: str = "none") -> Case:
    tags = frozenset({"hostile"}) if empty != "none" or 0 in shape or shape[0] == 1 else frozenset()
    values = {"dtype": dtype, "head_dim": shape[3]}
    return Case(name, values, lambda device, seed: build(shape, dtype, empty, device, seed), tags)


def build(shape: tuple[int, int, int, int], dtype: torch.dtype, empty: str, device: torch.device, seed: int) -> Trial:
    """``empty``: "some" states saw no key and hold NaN, "all" did, "far" has log-sums hundreds apart, "strided" is a view."""
    generator = torch.Generator().manual_seed(seed)
    o = torch.randn(shape, generator=generator)
    lse = torch.randn(shape[:3], generator=generator) * (300.0 if empty == "far" else 3.0)
    if empty in ("some", "all"):
        gone = torch.rand(shape[:3], generator=generator) < (0.4 if empty == "some" else 2.0)
        lse[gone] = -math.inf
        o[gone] = math.nan
    o, lse = o.to(device=device, dtype=dtype), lse.to(device)
    if empty == "strided":
        o = torch.cat([o, o.new_full(o.shape, math.nan)], dim=2)[:, :, : shape[2]]

    def run(kernel: MergeStates) -> dict[str, Tensor]:
        o_out = torch.full(shape[1:], math.nan, dtype=dtype, device=device)
        lse_out = torch.full(shape[1:3], math.nan, device=device)
        kernel(o, lse, o_out, lse_out)
        return {"o": o_out, "lse": lse_out}

    def expected() -> dict[str, Tensor]:
        o_out, lse_out = merge(o, lse, torch.float64)
        return {"o": o_out, "lse": lse_out}

    return Trial(run, expected, {"o": attention_tolerance(dtype), "lse": lse_tolerance(torch.float32)})


def cases() -> Iterator[Case]:
    """All are cheap."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield _case(f"two_{name}", (2, 5, 3, 64), dtype)
        yield _case(f"many_{name}", (9, 4, 2, 128), dtype, "some")
    yield _case("one_state", (1, 3, 2, 64), torch.bfloat16)
    yield _case("no_state", (0, 3, 2, 64), torch.float32)
    yield _case("no_token", (2, 0, 2, 64), torch.float32)
    yield _case("all_empty", (3, 4, 2, 64), torch.bfloat16, "all")
    yield _case("far_apart", (4, 4, 2, 64), torch.float32, "far")
    yield _case("strided", (3, 4, 2, 96), torch.bfloat16, "strided")
    for head_dim in (16, 80, 192, 256):
        yield _case(f"head_dim_{head_dim}", (3, 2, 5, head_dim), torch.bfloat16, "some")
