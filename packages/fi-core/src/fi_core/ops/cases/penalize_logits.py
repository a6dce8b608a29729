"""Conformance cases of ``penalize_logits``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contract import EXACT, Case, Trial
from ...reference.sampling import penalize_logits
from ...sampling import PenaltyParams
from ...tolerances import ROUNDED
from . import guarded, name_of
from .sampling_inputs import RowMaker, masked, noise

_COLUMNS = {
    "allowed": ("allowed",),
    "bias": ("bias_indptr", "bias_tokens", "bias_values"),
    "repetition": ("repetition", "prompt_counts", "output_counts"),
    "frequency": ("frequency", "output_counts"),
    "presence": ("presence", "output_counts"),
}
_ALL = tuple(_COLUMNS)


@dataclass(frozen=True)
class PenaltyCase:
    """Parts and layout. ``history``: the counts given to repetition; ``held_rows`` > 0: the counts have that many rows
    and ``rows`` maps to them with repeats; ``after``: foreign elements after each row."""

    name: str
    parts: tuple[str, ...] = _ALL
    vocab_size: int = 97
    num_rows: int = 7
    dtype: torch.dtype = torch.float32
    history: tuple[str, ...] = ("prompt_counts", "output_counts")
    held_rows: int = 0
    in_place: bool = False
    after: int = 0
    make: RowMaker = noise


def _penalty_cases() -> Iterator[PenaltyCase]:
    for part in _ALL:
        yield PenaltyCase(part, (part,))
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        yield PenaltyCase(f"all_{name_of(dtype)}", dtype=dtype)
    for vocab_size in (1, 2, 31, 32, 33, 512, 4096):
        yield PenaltyCase(f"all_v{vocab_size}", vocab_size=vocab_size, num_rows=3)
    yield PenaltyCase("repetition_prompt", ("repetition",), history=("prompt_counts",))
    yield PenaltyCase("repetition_output", ("repetition",), history=("output_counts",))
    yield PenaltyCase("frequency_presence", ("frequency", "presence"))
    yield PenaltyCase("rows", held_rows=4)
    yield PenaltyCase("in_place", in_place=True)
    yield PenaltyCase("in_place_strided_bf16", in_place=True, after=31, dtype=torch.bfloat16, held_rows=20)
    yield PenaltyCase("strided", after=31)
    yield PenaltyCase("masked", make=masked)


def _random_bias(case: PenaltyCase, generator: torch.Generator) -> dict[str, Tensor]:
    """0 to 4 entries a row (the third row none), some of them padding with -1, and two entries past the last row."""
    most = min(4, case.vocab_size)
    counts = torch.randint(0, most + 1, (case.num_rows,), generator=generator)
    counts[2:3] = 0
    tokens = [torch.randperm(case.vocab_size, generator=generator)[:count] for count in counts.tolist()]
    flat = torch.cat([*tokens, torch.zeros(2, dtype=torch.int64)]).to(torch.int32)
    flat[::5] = -1
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(torch.int32)
    return {"bias_indptr": indptr, "bias_tokens": flat, "bias_values": torch.randn(flat.shape, generator=generator) * 5}


def _random_penalties(case: PenaltyCase, generator: torch.Generator) -> PenaltyParams:
    words = (case.vocab_size + 31) // 32
    held = (case.held_rows or case.num_rows, case.vocab_size)
    every = _random_bias(case, generator)
    every["allowed"] = torch.randint(-(2**31), 2**31, (case.num_rows, words), generator=generator).to(torch.int32)
    every["repetition"] = torch.rand(case.num_rows, generator=generator) + 0.6
    every["repetition"][::3] = 1.0
    for name in ("frequency", "presence"):
        every[name] = torch.randn(case.num_rows, generator=generator)
    for name in ("prompt_counts", "output_counts"):
        every[name] = torch.randint(-3, 4, held, generator=generator).clamp(min=0).to(torch.int32)
    names = {column for part in case.parts for column in _COLUMNS[part]}
    if case.parts == ("repetition",):
        names = {"repetition", *case.history}
    penalties = PenaltyParams(**{name: every[name] for name in names})
    if case.held_rows:
        rows = torch.randint(0, case.held_rows, (case.num_rows,), generator=generator)
        penalties = replace(penalties, rows=rows.to(torch.int32))
    return penalties


def _on_device(penalties: PenaltyParams, device: torch.device) -> PenaltyParams:
    values = {item.name: getattr(penalties, item.name) for item in fields(penalties)}
    return PenaltyParams(**{name: value.to(device) for name, value in values.items() if value is not None})


def _build(case: PenaltyCase, device: torch.device, seed: int) -> Trial:
    generator = torch.Generator().manual_seed(seed)
    logits = case.make(case.num_rows, case.vocab_size, generator).to(case.dtype)
    penalties = _random_penalties(case, generator)

    def buffer(content: Tensor | None = None) -> Any:
        return guarded(logits.shape, case.dtype, device, after=case.after, content=content)

    def run(kernel: Any) -> Mapping[str, Tensor]:
        given = buffer(logits.to(device))
        out = given if case.in_place else buffer()
        kernel(given.view, _on_device(penalties, device), out.view)
        return {"out": out.view.contiguous(), "rest": out.rest()}

    def expected() -> Mapping[str, Tensor]:
        out = torch.empty(logits.shape, dtype=torch.float64)
        penalize_logits(logits, penalties, out, compute_dtype=torch.float64)
        return {"out": out, "rest": buffer().rest()}

    return Trial(run, expected, {"out": ROUNDED[case.dtype], "rest": EXACT})


def cases() -> Iterator[Case]:
    """Every case of ``penalize_logits``."""
    for case in _penalty_cases():
        hostile_rows = case.make is not noise or case.after % 2 or case.held_rows
        values = {"dtype": case.dtype, "vocab_size": case.vocab_size, "parts": frozenset(case.parts)}
        yield Case(case.name, values, partial(_build, case), frozenset({"hostile"} if hostile_rows else ()))
