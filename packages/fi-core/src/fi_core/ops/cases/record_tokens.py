"""Conformance cases of ``record_tokens``: every word of the history must be equal, as a set of entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contract import EXACT, Case, Trial
from ...reference.sampling import record_tokens
from ...sampling import TokenHistory
from .penalty_inputs import map_history, random_history, random_slots, spread


@dataclass(frozen=True)
class RecordCase:
    """``num_tokens`` a row, drawn from ``num_known`` ids (few: they repeat); ``empty``: of new histories; ``slotted``:
    rows lie in columns with gaps, and some are none."""

    name: str
    num_rows: int = 7
    vocab_size: int = 97
    capacity: int = 24
    num_tokens: int = 1
    num_known: int = 97
    empty: bool = False
    slotted: bool = False


def _record_cases() -> Iterator[RecordCase]:
    yield RecordCase("one_token")
    yield RecordCase("new", empty=True)
    yield RecordCase("several", num_tokens=5, num_known=12)
    yield RecordCase("same_token", num_tokens=9, num_known=1)
    yield RecordCase("slots", slotted=True, num_rows=20)
    yield RecordCase("slots_several", slotted=True, num_rows=20, num_tokens=4, num_known=9)
    yield RecordCase("overfull", capacity=3, num_tokens=7)
    yield RecordCase("one_place", capacity=1, num_tokens=3)
    yield RecordCase("v1", vocab_size=1, num_known=1, num_tokens=2)
    yield RecordCase("v128256", vocab_size=128256, num_known=128256, num_rows=3, num_tokens=3)
    yield RecordCase("large", num_rows=3, vocab_size=5000, capacity=2048, num_known=5000, num_tokens=6)


def _sorted(history: TokenHistory) -> TokenHistory:
    """Entries in use in the order of their tokens, the others zero: their order is left open."""
    capacity = history.entries.shape[1]
    used = torch.arange(capacity, device=history.entries.device) < history.num_entries.unsqueeze(1)
    entries = history.entries.masked_fill(~used.unsqueeze(2), 2**31 - 1)
    order = entries[:, :, 0].sort(dim=1, stable=True).indices
    entries = entries.gather(1, order.unsqueeze(2).expand_as(entries))
    entries = entries.masked_fill(entries[:, :, :1] == 2**31 - 1, 0)
    return TokenHistory(history.seen, entries, history.num_entries, history.num_output)


def _build(case: RecordCase, device: torch.device, seed: int) -> Trial:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, case.num_known, (case.num_rows, case.num_tokens), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.15] = -1
    tokens[0, 0] = case.num_known - 1  # one at least is there to record
    history = random_history(case.num_rows, case.vocab_size, case.capacity, generator)
    if case.empty:
        history = TokenHistory.empty(case.num_rows, case.vocab_size, case.capacity)
    slots = None
    if case.slotted:
        slots = random_slots(case.num_rows, generator)
        history = map_history(history, lambda column: spread(column, slots))

    def named(history: TokenHistory) -> Mapping[str, Tensor]:
        found = _sorted(history)
        return dict(zip(("seen", "entries", "num_entries", "num_output"), found.tensors, strict=True))

    def run(kernel: Any) -> Mapping[str, Tensor]:
        held = map_history(history, lambda tensor: tensor.clone().to(device))
        kernel(held, tokens.to(device), None if slots is None else slots.to(device))
        return named(held)

    def expected() -> Mapping[str, Tensor]:
        held = map_history(history, torch.clone)
        record_tokens(held, tokens, slots)
        return named(held)

    return Trial(run, expected, dict.fromkeys(("seen", "entries", "num_entries", "num_output"), EXACT))


def cases() -> Iterator[Case]:
    """Every case of ``record_tokens``."""
    for case in _record_cases():
        hostile = case.slotted or case.capacity < case.num_tokens or case.vocab_size == 1
        yield Case(
            case.name, {"capacity": case.capacity}, partial(_build, case), frozenset({"hostile"} if hostile else ())
        )
