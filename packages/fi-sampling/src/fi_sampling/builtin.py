"""The built-in operations and the rules that fuse them into single calls of fi_core's operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import fi_core as fi
import torch
from fi_core import ArgumentError, FilterParams, PenaltyParams
from torch import Tensor

from .pipeline import FusionRule, Kind, LogitsOp, Step

_COLUMNS = {
    "allowed": ("allowed",),
    "bias": ("bias_indptr", "bias_tokens", "bias_values"),
    "repetition": ("repetition", "prompt_counts", "output_counts"),
    "frequency": ("frequency", "output_counts"),
    "presence": ("presence", "output_counts"),
}
_HISTORY = {"repetition", "frequency", "presence"}
_FILTERS = ("temperature", "top_k", "top_p", "min_p", "typical_p")


def _penalize(names: Sequence[str]) -> Callable[[Tensor, Step], Tensor]:
    """A run function that applies those of the penalties ``names`` that some row uses."""

    def run(logits: Tensor, step: Step) -> Tensor:
        active = step.penalties.active.intersection(names)
        if not active:
            return logits
        if active == step.penalties.active:
            return fi.penalize_logits(logits, step.penalties)
        columns = {column for name in active for column in _COLUMNS[name]}
        if active & _HISTORY:
            columns.add("rows")
        return fi.penalize_logits(logits, PenaltyParams(**{name: getattr(step.penalties, name) for name in columns}))

    return run


def _only(filters: FilterParams, names: Sequence[str]) -> FilterParams:
    """``filters`` without those that are not in ``names``."""
    others = filters.active.difference(names)
    if not others and (filters.temperature is None or "temperature" in names):
        return filters
    if others and filters.order == "joint" and filters.active.intersection(names):
        raise ArgumentError("filters.order", "'sequential', unless one operation fuses every filter", "'joint'")
    return FilterParams(**{name: getattr(filters, name) for name in names}, order=filters.order)


def _filter(names: Sequence[str], kind: str) -> Callable[[Tensor, Step], Tensor]:
    """A run function that applies the filters ``names`` in one call; with kind "logits" it skips an idle call."""

    def run(logits: Tensor, step: Step) -> Tensor:
        filters = _only(step.filters, names)
        if kind == "logits" and all(getattr(filters, name) is None for name in names):
            return logits
        return fi.filter_logits(logits, filters, kind)

    return run


def _sample(names: Sequence[str]) -> Callable[[Tensor, Step], Tensor]:
    def run(logits: Tensor, step: Step) -> Tensor:
        return fi.sample(logits, _only(step.filters, names), step.keys)

    return run


def _draw(logits: Tensor, step: Step) -> Tensor:
    return fi.sample(logits, FilterParams(), step.keys)


def _draw_probs(probs: Tensor, step: Step) -> Tensor:
    """A draw from probabilities is the verification of a chain without drafts."""
    no_drafts = torch.empty((probs.shape[0], 0), dtype=torch.int64, device=probs.device)
    tokens, _ = fi.verify_chain(no_drafts, None, probs.unsqueeze(1), step.keys)
    return tokens.squeeze(1)


PENALTIES = tuple(
    LogitsOp(name, Kind.LOGITS, Kind.LOGITS, _penalize((name,)), builtin=True)
    for name in ("allowed", "bias", "repetition", "frequency", "presence")
)
"""Penalties in the order in which ``fi_core.penalize_logits`` applies them."""

FILTERS = tuple(LogitsOp(name, Kind.LOGITS, Kind.LOGITS, _filter((name,), "logits"), builtin=True) for name in _FILTERS)
"""Temperature and filters in the order in which ``fi_core.sample`` applies them."""

DRAW = LogitsOp("draw", Kind.LOGITS, Kind.TOKENS, _draw, builtin=True)
SOFTMAX = LogitsOp("softmax", Kind.LOGITS, Kind.PROBS, _filter((), "probs"), builtin=True)
DRAW_PROBS = LogitsOp("draw_probs", Kind.PROBS, Kind.TOKENS, _draw_probs, builtin=True)

BUILTIN_OPS = {op.name: op for op in (*PENALTIES, *FILTERS, DRAW, SOFTMAX, DRAW_PROBS)}
"""Every built-in operation by name."""

DEFAULT_OPS = (*PENALTIES, *FILTERS, DRAW)
"""The default pipeline; put own operations between them, such as before FILTERS or before the draw."""


def _ordered_run(ops: Sequence[LogitsOp], order: Sequence[LogitsOp]) -> int:
    """How many operations at the head of ``ops`` occur in ``order`` and in that order, each once."""
    place, count = -1, 0
    for op in ops:
        if op not in order[place + 1 :]:
            break
        place, count = order.index(op), count + 1
    return count


def _run_then(last: LogitsOp) -> Callable[[Sequence[LogitsOp]], int]:
    """Match filters in order followed by ``last``."""

    def match(ops: Sequence[LogitsOp]) -> int:
        count = _ordered_run(ops, FILTERS)
        return count + 1 if count and ops[count : count + 1] == (last,) else 0

    return match


def _fuse(
    name: str, gives: Kind, make: Callable[[Sequence[str]], Callable[[Tensor, Step], Tensor]]
) -> Callable[[Sequence[LogitsOp]], LogitsOp]:
    """Fuse operations by what ``make`` builds of their names."""
    return lambda ops: LogitsOp(
        name, Kind.LOGITS, gives, make([op.name for op in ops if op.gives is Kind.LOGITS]), True
    )


BUILTIN_RULES = (
    FusionRule("penalties", lambda ops: _ordered_run(ops, PENALTIES), _fuse("penalize_logits", Kind.LOGITS, _penalize)),
    FusionRule("filtered_draw", _run_then(DRAW), _fuse("sample", Kind.TOKENS, _sample)),
    FusionRule(
        "filtered_softmax",
        _run_then(SOFTMAX),
        _fuse("filter_logits", Kind.PROBS, lambda names: _filter(names, "probs")),
    ),
    FusionRule(
        "filters",
        lambda ops: _ordered_run(ops, FILTERS),
        _fuse("filter_logits", Kind.LOGITS, lambda names: _filter(names, "logits")),
    ),
)
"""The built-in fusion rules; every fused operation gives bit for bit what the operations give one by one."""
