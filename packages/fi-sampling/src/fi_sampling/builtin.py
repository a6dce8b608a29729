"""The built-in operations and the rules that fuse them into single calls of fi_core's operations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import fi_core as fi
import torch
from fi_core import ArgumentError, FilterParams, PenaltyParams
from fi_core.dispatch import select_for
from torch import Tensor

from .draws import draw, launches_of_draw, launches_of_penalties
from .pipeline import FusionRule, Kind, LogitsOp, Step

_COLUMNS = {
    "allowed": ("allowed", "step_allowed"),
    "bias": ("bias_indptr", "bias_tokens", "bias_values", "bias_until"),
    "repetition": ("repetition", "prompt_counts", "output_counts", "history"),
    "frequency": ("frequency", "output_counts", "history"),
    "presence": ("presence", "output_counts", "history"),
}
_HISTORY = {"repetition", "frequency", "presence"}
_FILTERS = ("temperature", "top_k", "top_p", "min_p", "typical_p")

Run = Callable[[Tensor, Step], Tensor]


def _some(penalties: PenaltyParams, names: Collection[str]) -> PenaltyParams:
    """``penalties`` without the parts that are not in ``names``."""
    active = penalties.active.intersection(names)
    if active == penalties.active:
        return penalties
    columns = {column for name in active for column in _COLUMNS[name]}
    if "bias" in active and penalties.bias_until is not None:
        columns.add("history")
    if active & _HISTORY or "history" in columns:
        columns.add("rows")
    return PenaltyParams(**{name: getattr(penalties, name) for name in columns})


def _penalize(names: Collection[str]) -> Run:
    """A run function that applies those of the penalties ``names`` that some row uses."""

    def run(logits: Tensor, step: Step) -> Tensor:
        penalties = _some(step.penalties, names)
        return fi.penalize_logits(logits, penalties, slots=step.slots) if penalties.active else logits

    return run


def _penalty(name: str, names: Collection[str]) -> LogitsOp:
    def launches(logits: Tensor, step: Step) -> list[str]:
        penalties = _some(step.penalties, names)
        return launches_of_penalties(logits, penalties) if penalties.active else []

    return LogitsOp(name, Kind.LOGITS, Kind.LOGITS, _penalize(names), True, launches)


def _only(filters: FilterParams, names: Collection[str]) -> FilterParams:
    """``filters`` without those that are not in ``names``."""
    others = filters.active.difference(names)
    if not others and (filters.temperature is None or "temperature" in names):
        return filters
    if others and filters.order == "joint" and filters.active.intersection(names):
        raise ArgumentError("filters.order", "'sequential', unless one operation fuses every filter", "'joint'")
    kept = {name: getattr(filters, name) for name in _FILTERS if name in names}
    return FilterParams(**kept, order=filters.order)


def _filter(name: str, names: Collection[str], kind: str) -> LogitsOp:
    """An operation that applies the filters ``names`` in one call; with kind "logits" it skips an idle call."""

    def idle(filters: FilterParams) -> bool:
        return kind == "logits" and all(getattr(filters, item) is None for item in names)

    def run(logits: Tensor, step: Step) -> Tensor:
        filters = _only(step.filters, names)
        return logits if idle(filters) else fi.filter_logits(logits, step.rows_of(filters), kind)

    def launches(logits: Tensor, step: Step) -> list[str]:
        filters = _only(step.filters, names)
        if idle(filters):
            return []
        values = {"filters": filters.active, "order": filters.order, "kind": kind}
        chosen = select_for("filter_logits", logits.device, dtype=logits.dtype, vocab_size=logits.shape[1], **values)
        gather = [] if step.slots is None else ["gather of parameters, a launch a column"]
        return [*gather, f"{chosen.entry.full_name} ({', '.join(names)})"]

    return LogitsOp(name, Kind.LOGITS, Kind.LOGITS if kind == "logits" else Kind.PROBS, run, True, launches)


def _sample(name: str, names: Collection[str]) -> LogitsOp:
    """An operation that applies the penalties and filters ``names`` and draws."""

    def parts(step: Step) -> tuple[FilterParams, PenaltyParams]:
        return _only(step.filters, names), _some(step.penalties, names)

    def run(logits: Tensor, step: Step) -> Tensor:
        return draw(logits, *parts(step), step)

    def launches(logits: Tensor, step: Step) -> list[str]:
        return launches_of_draw(logits, *parts(step), step)

    return LogitsOp(name, Kind.LOGITS, Kind.TOKENS, run, True, launches)


def _draw_probs(probs: Tensor, step: Step) -> Tensor:
    """A draw from probabilities is the verification of a chain without drafts."""
    no_drafts = torch.empty((probs.shape[0], 0), dtype=torch.int64, device=probs.device)
    tokens, _ = fi.verify_chain(no_drafts, None, probs.unsqueeze(1), step.row_keys)
    return tokens.squeeze(1)


PENALTIES = tuple(_penalty(name, (name,)) for name in fi.sampling.PENALTIES)
"""Penalties in the order in which ``fi_core.penalize_logits`` applies them."""

FILTERS = tuple(_filter(name, (name,), "logits") for name in _FILTERS)
"""Temperature and filters in the order in which ``fi_core.sample`` applies them."""

DRAW = _sample("draw", ())
SOFTMAX = _filter("softmax", (), "probs")
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


def _run_then(order: Sequence[LogitsOp], last: LogitsOp) -> Callable[[Sequence[LogitsOp]], int]:
    """Match operations of ``order``, in order, followed by ``last``."""

    def match(ops: Sequence[LogitsOp]) -> int:
        count = _ordered_run(ops, order)
        return count + 1 if count and ops[count : count + 1] == (last,) else 0

    return match


def _names(ops: Sequence[LogitsOp]) -> list[str]:
    """Of those that change logits."""
    return [op.name for op in ops if op.gives is Kind.LOGITS]


BUILTIN_RULES = (
    FusionRule("whole_draw", _run_then((*PENALTIES, *FILTERS), DRAW), lambda ops: _sample("sample", _names(ops))),
    FusionRule(
        "penalties", lambda ops: _ordered_run(ops, PENALTIES), lambda ops: _penalty("penalize_logits", _names(ops))
    ),
    FusionRule(
        "filtered_softmax",
        _run_then(FILTERS, SOFTMAX),
        lambda ops: _filter("filter_logits", _names(ops), "probs"),
    ),
    FusionRule(
        "filters",
        lambda ops: _ordered_run(ops, FILTERS),
        lambda ops: _filter("filter_logits", _names(ops), "logits"),
    ),
)
"""The built-in fusion rules; every fused operation gives what the operations give one by one, bit for bit in float32 (in
other dtypes the operations round one by one, and a fused one once)."""
