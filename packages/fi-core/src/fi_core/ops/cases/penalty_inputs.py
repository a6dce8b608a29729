"""Random penalties and token histories of the sampling cases, and their placement in columns with gaps."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ...sampling import PenaltyParams, TokenHistory
from . import SENTINEL

_COUNTED = {
    "repetition": ("prompt_counts", "output_counts"),
    "frequency": ("output_counts",),
    "presence": ("output_counts",),
}
_MOST_BIAS = 4
_GAP = 3
"""Places of columns beyond one for each output."""


@dataclass(frozen=True)
class PenaltyShape:
    """What to make: ``parts`` for ``num_rows`` outputs. ``counts``: "dense" or "sparse"; ``capacity``: of a history;
    ``held_rows`` > 0: the counts have that many rows and ``rows`` maps to them with repeats; ``history``: the counts
    given to repetition alone; ``overfull``: some histories did not fit; ``in_steps``: masks of the step too, and bias
    that changes with the length of the output."""

    parts: Collection[str]
    num_rows: int
    vocab_size: int
    counts: str = "dense"
    capacity: int = 24
    held_rows: int = 0
    history: tuple[str, ...] = ("prompt_counts", "output_counts")
    overfull: bool = False
    in_steps: bool = False


def map_penalties(penalties: PenaltyParams, change: Callable[[Tensor], Tensor]) -> PenaltyParams:
    """The record with ``change`` applied to each of its tensors."""
    values = {item.name: getattr(penalties, item.name) for item in fields(penalties)}
    history = values.pop("history")
    changed = {name: None if value is None else change(value) for name, value in values.items()}
    return PenaltyParams(**changed, history=None if history is None else map_history(history, change))


def map_history(history: TokenHistory, change: Callable[[Tensor], Tensor]) -> TokenHistory:
    """The record with ``change`` applied to each of its tensors."""
    return TokenHistory(*(change(tensor) for tensor in history.tensors))


def random_history(num_rows: int, vocab_size: int, capacity: int, generator: torch.Generator) -> TokenHistory:
    """0 to ``capacity`` distinct tokens a row, some told more than once, and prompts; unused entries hold other tokens."""
    words = (vocab_size + 31) // 32
    seen = torch.zeros((num_rows, words * 32), dtype=torch.bool)
    seen[:, :vocab_size] = torch.rand((num_rows, vocab_size), generator=generator) < 0.2
    entries = torch.randint(0, vocab_size, (num_rows, capacity, 2), generator=generator)
    most = min(capacity, vocab_size)
    num_entries = torch.randint(0, most + 1, (num_rows,), generator=generator)
    num_entries[::5] = most
    num_entries[1::5] = 0
    counts = torch.randint(1, 4, (num_rows, capacity), generator=generator)
    for row in range(num_rows):
        tokens = torch.randperm(vocab_size, generator=generator)[: int(num_entries[row])]
        entries[row, : len(tokens), 0] = tokens
        entries[row, : len(tokens), 1] = counts[row, : len(tokens)]
        seen[row, tokens] = True
    used = torch.arange(capacity) < num_entries.unsqueeze(1)
    bits = (seen.view(num_rows, words, 32).to(torch.int64) << torch.arange(32)).sum(dim=2)
    columns = (bits, entries, num_entries, (counts * used).sum(dim=1))
    return TokenHistory(*(column.to(torch.int32) for column in columns))


def random_masks(num_rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Bitmasks int32 [num_rows, words] of random words."""
    words = (vocab_size + 31) // 32
    return torch.randint(-(2**31), 2**31, (num_rows, words), generator=generator).to(torch.int32)


def random_penalties(shape: PenaltyShape, generator: torch.Generator) -> PenaltyParams:
    """Penalties with one row an output."""
    every = _random_bias(shape, generator)
    every["allowed"] = random_masks(shape.num_rows, shape.vocab_size, generator)
    every["repetition"] = torch.rand(shape.num_rows, generator=generator) + 0.6
    every["repetition"][::3] = 1.0
    for name in ("frequency", "presence"):
        every[name] = torch.randn(shape.num_rows, generator=generator)
        every[name][4::8] = 0  # rows that count nothing
    if shape.in_steps:
        # Words with most bits set, so that masks leave tokens between them.
        masks = [random_masks(shape.num_rows, shape.vocab_size, generator) for _ in range(3)]
        every["step_allowed"] = masks[0] | masks[1] | masks[2]
    names = _names(shape, every)
    if shape.counts == "dense" or not any(part in _COUNTED for part in shape.parts):
        held = (shape.held_rows or shape.num_rows, shape.vocab_size)
        for name in ("prompt_counts", "output_counts"):
            every[name] = torch.randint(-3, 4, held, generator=generator).clamp(min=0).to(torch.int32)
        penalties = PenaltyParams(**{name: every[name] for name in names}, history=None)
    else:
        history = random_history(shape.held_rows or shape.num_rows, shape.vocab_size, shape.capacity, generator)
        if shape.overfull:
            history.num_entries[::4] = shape.capacity + 1
        penalties = PenaltyParams(
            **{name: every[name] for name in names if not name.endswith("_counts")}, history=history
        )
    if shape.held_rows:
        rows = torch.randint(0, shape.held_rows, (shape.num_rows,), generator=generator)
        penalties = replace(penalties, rows=rows.to(torch.int32))
    return penalties


def _names(shape: PenaltyShape, every: dict[str, Tensor]) -> set[str]:
    if tuple(shape.parts) == ("repetition",):
        return {"repetition", *shape.history}
    names = set(shape.parts) - {"bias"}
    for part in shape.parts:
        names.update(_COUNTED.get(part, ()))
    if "bias" in shape.parts:
        names |= {name for name in every if name.startswith("bias_")}
    if "allowed" in shape.parts and shape.in_steps:
        names.add("step_allowed")
    return names


def _random_bias(shape: PenaltyShape, generator: torch.Generator) -> dict[str, Tensor]:
    """0 to 4 entries a row (the third row none), some of them padding with -1, and two entries past the last row."""
    most = min(_MOST_BIAS, shape.vocab_size)
    counts = torch.randint(0, most + 1, (shape.num_rows,), generator=generator)
    counts[2:3] = 0
    tokens = [torch.randperm(shape.vocab_size, generator=generator)[:count] for count in counts.tolist()]
    flat = torch.cat([*tokens, torch.zeros(2, dtype=torch.int64)]).to(torch.int32)
    flat[::5] = -1
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(torch.int32)
    found = {"bias_indptr": indptr, "bias_tokens": flat}
    found["bias_values"] = torch.randn(flat.shape, generator=generator) * 5
    if shape.in_steps and shape.counts == "sparse" and any(part in _COUNTED for part in shape.parts):
        found["bias_until"] = torch.randint(0, 20, flat.shape, generator=generator).to(torch.int32)
    return found


def random_slots(num_outputs: int, generator: torch.Generator) -> Tensor:
    """Distinct places int64 [num_outputs] of columns with gaps, in mixed order; every seventh is -1."""
    slots = torch.randperm(num_outputs + _GAP, generator=generator)[:num_outputs]
    slots[3::7] = -1
    return slots


def spread(column: Tensor, slots: Tensor) -> Tensor:
    """``column`` [N, ...] at ``slots`` of a new column, whose other places are poison."""
    poison = float("nan") if column.dtype.is_floating_point else SENTINEL
    held = column.new_full((slots.shape[0] + _GAP, *column.shape[1:]), poison)
    used = slots >= 0
    held[slots[used]] = column[used]
    return held


def spread_penalties(penalties: PenaltyParams, slots: Tensor) -> PenaltyParams:
    """``penalties`` with its rows at ``slots``, but for what always has a row an output, and for what ``rows`` maps."""
    kept = {"step_allowed": penalties.step_allowed, "rows": penalties.rows}
    history = penalties.history
    if history is not None and penalties.rows is None:
        history = map_history(history, lambda column: spread(column, slots))
    for name in ("allowed", "repetition", "frequency", "presence"):
        column = getattr(penalties, name)
        kept[name] = None if column is None else spread(column, slots)
    if penalties.bias_indptr is not None:
        kept |= _spread_bias(penalties, slots)
    return PenaltyParams(**kept, history=history)


def _spread_bias(penalties: PenaltyParams, slots: Tensor) -> dict[str, Tensor | None]:
    """Entries in the order of the slots; a place without an output has one entry, of token 0."""
    indptr = penalties.bias_indptr
    assert indptr is not None
    output_at = {int(slot): output for output, slot in enumerate(slots.tolist()) if slot >= 0}
    pieces, counts = [], []
    for place in range(slots.shape[0] + _GAP):
        output = output_at.get(place)
        begin, end = (0, 1) if output is None else (int(indptr[output]), int(indptr[output + 1]))
        pieces.append(torch.arange(begin, end))
        counts.append(end - begin)
    chosen = torch.cat(pieces)
    ends = torch.tensor([0, *counts], dtype=torch.int64).cumsum(0).to(torch.int32)
    columns = {name: getattr(penalties, name) for name in ("bias_tokens", "bias_values", "bias_until")}
    return {"bias_indptr": ends} | {name: None if value is None else value[chosen] for name, value in columns.items()}
