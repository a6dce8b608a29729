"""Conformance cases of ``top_k``: values and indices must be equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contract import EXACT, Case, Trial
from ...reference.sampling import top_k
from . import guarded, name_of, poisoned
from .sampling_inputs import RowMaker, flat, hostile, masked, noise, tied


@dataclass(frozen=True)
class TopKCase:
    """Shape, content and layout; ``after``: foreign elements after each row."""

    name: str
    k: int
    vocab_size: int = 97
    num_rows: int = 14
    dtype: torch.dtype = torch.float32
    make: RowMaker = noise
    after: int = 0


def _top_k_cases() -> Iterator[TopKCase]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        yield TopKCase(f"plain_{name_of(dtype)}", 8, dtype=dtype)
    for k, vocab_size in (
        (1, 1),
        (1, 2),
        (2, 2),
        (3, 31),
        (64, 256),
        (100, 511),
        (511, 511),
        (50, 4096),
        (600, 2000),
        (2048, 2500),
    ):
        yield TopKCase(f"k{k}_v{vocab_size}", k, vocab_size, num_rows=3, make=tied)
    for make in (flat, tied, masked, hostile):
        yield TopKCase(f"{make.__name__}_k20", 20, make=make, vocab_size=130)
    yield TopKCase("masked_all", 64, vocab_size=64, make=masked)
    yield TopKCase("strided", 5, after=31)
    yield TopKCase("one_row", 5, num_rows=1)


def _build(case: TopKCase, device: torch.device, seed: int) -> Trial:
    generator = torch.Generator().manual_seed(seed)
    logits = case.make(case.num_rows, case.vocab_size, generator).to(case.dtype)
    shape = (case.num_rows, case.k)

    def run(kernel: Any) -> Mapping[str, Tensor]:
        given = guarded(logits.shape, case.dtype, device, after=case.after, content=logits.to(device))
        values, indices = poisoned(shape, torch.float32, device), poisoned(shape, torch.int64, device)
        kernel(given.view, values, indices)
        return {"values": values, "indices": indices}

    def expected() -> Mapping[str, Tensor]:
        values, indices = torch.empty(shape), torch.empty(shape, dtype=torch.int64)
        top_k(logits, values, indices)
        return {"values": values, "indices": indices}

    return Trial(run, expected, {"values": EXACT, "indices": EXACT})


def cases() -> Iterator[Case]:
    """Every case of ``top_k``."""
    for case in _top_k_cases():
        hostile_rows = case.make is not noise or case.after % 2
        values = {"dtype": case.dtype, "vocab_size": case.vocab_size, "k": case.k}
        yield Case(case.name, values, partial(_build, case), frozenset({"hostile"} if hostile_rows else ()))
