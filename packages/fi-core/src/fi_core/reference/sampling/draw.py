"""References of ``sample`` and ``filter_logits``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...random import PURPOSE_DRAW, random_bits
from ...sampling import NO_PENALTIES, DrawKeys, FilterParams, PenaltyParams
from .filters import keep_mask, valid_filters
from .masses import Weights, draw, first_of_largest
from .penalties import penalize_logits

Columns = TypeVar("Columns", FilterParams, DrawKeys)


def sample(
    logits: Tensor,
    filters: FilterParams,
    keys: DrawKeys,
    rows: Tensor | None,
    tokens: Tensor,
    penalties: PenaltyParams = NO_PENALTIES,
    slots: Tensor | None = None,
) -> None:
    """The ``Sample`` protocol; greedy rows cost an argmax, and only active filters cost a sort."""
    if rows is not None:
        logits = logits.index_select(0, rows)
    if penalties.active:
        changed = torch.empty_like(logits)
        penalize_logits(logits, penalties, changed, slots)
        logits = changed
    num_outputs = logits.shape[0]
    valid = torch.ones(num_outputs, dtype=torch.bool, device=logits.device)
    if slots is not None:
        valid = slots >= 0
        places = slots.clamp(min=0)
        filters = map_columns(filters, lambda column: column[places])
        keys = DrawKeys(keys.seed[places], keys.sample[places], keys.position)
    valid &= valid_filters(filters, num_outputs, logits.device)
    greedy = None if filters.temperature is None else filters.temperature <= 0
    if greedy is None or not greedy.any():
        tokens.copy_(_drawn(logits, filters, keys))
    elif greedy.all():
        tokens.copy_(first_of_largest(logits.to(torch.float32)))
    else:
        drawn_rows, greedy_rows = (~greedy).nonzero().squeeze(1), greedy.nonzero().squeeze(1)
        tokens[greedy_rows] = first_of_largest(logits[greedy_rows].to(torch.float32))
        drawn_filters = map_columns(filters, lambda column: column[drawn_rows])
        drawn_keys = map_columns(keys, lambda column: column[drawn_rows])
        tokens[drawn_rows] = _drawn(logits[drawn_rows], drawn_filters, drawn_keys)
    tokens.masked_fill_(~valid, -1)


def map_columns(record: Columns, change: Callable[[Tensor], Tensor]) -> Columns:
    """The record with ``change`` applied to each of its tensors."""
    columns = {field.name: getattr(record, field.name) for field in fields(record)}
    changed: dict[str, Any] = {name: change(value) for name, value in columns.items() if isinstance(value, Tensor)}
    return replace(record, **changed)


def _drawn(logits: Tensor, filters: FilterParams, keys: DrawKeys) -> Tensor:
    weights = Weights.of(logits, filters.temperature)
    mask = keep_mask(weights, filters)
    mass = weights.mass if mask is None else weights.mass * mask
    return torch.where(weights.usable, draw(mass, random_bits(keys, PURPOSE_DRAW)), -1)


def filter_logits(logits: Tensor, filters: FilterParams, kind: str, out: Tensor) -> None:
    """The ``FilterLogits`` protocol; ``out`` may be float64 (then the probabilities are the oracle's)."""
    temperature = filters.temperature
    greedy = None
    if temperature is not None:
        greedy = temperature <= 0
        temperature = torch.where(greedy, 1.0, temperature)
    weights = Weights.of(logits, temperature)
    mask = keep_mask(weights, filters)
    if mask is None:
        mask = torch.ones_like(weights.mass, dtype=torch.bool)
    if greedy is not None:
        first = weights.scaled.argmax(dim=1, keepdim=True)
        mask = torch.where(greedy.unsqueeze(1), torch.zeros_like(mask).scatter_(1, first, True), mask)
    usable = weights.usable & valid_filters(filters, logits.shape[0], logits.device)
    mask &= usable.unsqueeze(1)
    if kind == "logits":
        out.copy_(weights.scaled.masked_fill(~mask, -torch.inf))
        return
    mass = weights.mass.masked_fill(~mask, 0)
    total = mass.sum(dim=1, keepdim=True).clamp(min=1)
    out.copy_(mass.to(torch.float64) / total.to(torch.float64))
