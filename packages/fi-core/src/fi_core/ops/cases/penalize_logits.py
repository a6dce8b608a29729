"""Conformance cases of ``penalize_logits``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contract import EXACT, Case, Trial
from ...reference.sampling import penalize_logits
from ...sampling import PENALTIES
from ...tolerances import ROUNDED
from . import guarded, name_of
from .penalty_inputs import PenaltyShape, map_penalties, random_penalties, random_slots, spread_penalties
from .sampling_inputs import RowMaker, masked, noise


@dataclass(frozen=True)
class PenaltyCase:
    """Parts and layout. ``history``, ``counts``, ``held_rows``, ``overfull``, ``in_steps``: as in PenaltyShape;
    ``slotted``: parameters lie in columns; ``after``: foreign elements after each row."""

    name: str
    parts: tuple[str, ...] = PENALTIES
    vocab_size: int = 97
    num_rows: int = 7
    dtype: torch.dtype = torch.float32
    history: tuple[str, ...] = ("prompt_counts", "output_counts")
    counts: str = "dense"
    capacity: int = 24
    held_rows: int = 0
    overfull: bool = False
    in_steps: bool = False
    slotted: bool = False
    in_place: bool = False
    after: int = 0
    make: RowMaker = noise


_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _penalty_cases() -> Iterator[PenaltyCase]:
    yield from _dense_cases()
    yield from _sparse_cases()


def _dense_cases() -> Iterator[PenaltyCase]:
    for part in PENALTIES:
        yield PenaltyCase(part, (part,))
    for dtype in _DTYPES:
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
    yield PenaltyCase("slots_masks_and_bias", ("allowed", "bias"), slotted=True, num_rows=15, in_steps=True)


def _sparse_cases() -> Iterator[PenaltyCase]:
    for part in ("repetition", "frequency", "presence"):
        yield PenaltyCase(f"sparse_{part}", (part,), counts="sparse")
    for dtype in _DTYPES:
        yield PenaltyCase(f"sparse_{name_of(dtype)}", dtype=dtype, counts="sparse", in_steps=True, num_rows=14)
    for vocab_size in (1, 31, 33, 4096, 20001):
        yield PenaltyCase(
            f"sparse_v{vocab_size}", vocab_size=vocab_size, num_rows=3, counts="sparse", capacity=1500, in_steps=True
        )
    yield PenaltyCase("sparse_one_entry", counts="sparse", capacity=1)
    yield PenaltyCase("sparse_rows", held_rows=4, counts="sparse", in_steps=True)
    yield PenaltyCase("sparse_overfull", counts="sparse", overfull=True, num_rows=12)
    yield PenaltyCase("sparse_overfull_repetition", ("repetition",), counts="sparse", overfull=True)
    yield PenaltyCase("sparse_slots", counts="sparse", slotted=True, in_steps=True, num_rows=15, after=7)
    yield PenaltyCase("sparse_slots_rows_in_place", counts="sparse", slotted=True, held_rows=4, in_place=True)
    yield PenaltyCase(
        "sparse_masked_bf16", counts="sparse", make=masked, dtype=torch.bfloat16, vocab_size=130, in_place=True
    )


def _build(case: PenaltyCase, device: torch.device, seed: int) -> Trial:
    generator = torch.Generator().manual_seed(seed)
    logits = case.make(case.num_rows, case.vocab_size, generator).to(case.dtype)
    shape = PenaltyShape(
        case.parts,
        case.num_rows,
        case.vocab_size,
        case.counts,
        case.capacity,
        case.held_rows,
        case.history,
        case.overfull,
        case.in_steps,
    )
    penalties, slots = random_penalties(shape, generator), None
    if case.slotted:
        slots = random_slots(case.num_rows, generator)
        penalties = spread_penalties(penalties, slots)

    def buffer(content: Tensor | None = None) -> Any:
        return guarded(logits.shape, case.dtype, device, after=case.after, content=content)

    def run(kernel: Any) -> Mapping[str, Tensor]:
        given = buffer(logits.to(device))
        out = given if case.in_place else buffer()
        placed = map_penalties(penalties, lambda tensor: tensor.to(device))
        kernel(given.view, placed, out.view, None if slots is None else slots.to(device))
        return {"out": out.view.contiguous(), "rest": out.rest()}

    def expected() -> Mapping[str, Tensor]:
        out = torch.empty(logits.shape, dtype=torch.float64)
        penalize_logits(logits, penalties, out, slots, compute_dtype=torch.float64)
        return {"out": out, "rest": buffer().rest()}

    return Trial(run, expected, {"out": ROUNDED[case.dtype], "rest": EXACT})


def cases() -> Iterator[Case]:
    """Every case of ``penalize_logits``."""
    for case in _penalty_cases():
        hostile_rows = case.make is not noise or case.after % 2 or case.held_rows or case.slotted or case.overfull
        counted = {"repetition", "frequency", "presence"}.intersection(case.parts)
        values = {"dtype": case.dtype, "vocab_size": case.vocab_size, "parts": frozenset(case.parts)}
        values["counts"] = case.counts if counted else "none"
        yield Case(case.name, values, partial(_build, case), frozenset({"hostile"} if hostile_rows else ()))
