"""The draw of a step in as few launches as the installed kernels allow."""

from __future__ import annotations

from collections.abc import Hashable

import fi_core as fi
import torch
from fi_core import FilterParams, PenaltyParams, UnsupportedError
from fi_core.dispatch import select_for
from fi_core.registry import KernelRegistry, Selection, forced_backend, registry
from fi_core.sampling import NO_PENALTIES
from torch import Tensor

from .pipeline import Step


class _Choices:
    """Whether a kernel draws with penalties or slots as readily as another without them; remembered as kernels are, by
    registry, device and forced backend."""

    def __init__(self) -> None:
        self._known: tuple[KernelRegistry | None, int, dict[tuple[Hashable, ...], bool]] = (None, 0, {})

    def fused(self, logits: Tensor, filters: FilterParams, penalties: frozenset[str], slots: bool) -> bool:
        """Whether one launch serves a draw from ``logits`` with ``penalties`` and ``slots``."""
        current = registry()
        owner, generation, known = self._known
        if owner is not current or generation != current.generation:
            known = {}
            self._known = (current, current.generation, known)
        request = (logits.dtype, logits.shape[1], filters.active, filters.order, penalties, slots)
        key = (forced_backend(), logits.device, *request)
        if key not in known:
            known[key] = self.reason(logits, filters, penalties, slots) is None
        return known[key]

    def reason(self, logits: Tensor, filters: FilterParams, penalties: frozenset[str], slots: bool) -> str | None:
        """None, or why the draw is not one launch: no kernel serves it whole, or only one that is not preferred (of another
        back end than the plain draw's, or declared below its own others)."""
        try:
            whole = _selection(logits, filters, penalties, slots).entry
        except UnsupportedError:
            return "no kernel serves the draw whole"
        try:
            plain = _selection(logits, filters, frozenset(), False).entry
        except UnsupportedError:
            return None
        if whole.backend == plain.backend and whole.priority >= plain.priority:
            return None
        return f"{plain.full_name} is preferred to {whole.full_name}"


_choices = _Choices()


def _selection(logits: Tensor, filters: FilterParams, penalties: frozenset[str], slots: bool) -> Selection:
    values = {"filters": filters.active, "order": filters.order, "penalties": penalties, "slots": slots}
    return select_for("sample", logits.device, dtype=logits.dtype, vocab_size=logits.shape[1], **values)


def draw(logits: Tensor, filters: FilterParams, penalties: PenaltyParams, step: Step) -> Tensor:
    """Tokens int64 [N] of logits [N, V] after ``penalties`` and ``filters``, which are among ``step``'s: one launch where
    a kernel is preferred for all of it, else the penalties first, and where no such kernel picks parameters from columns,
    after a gather of them."""
    slots, keys = step.slots, step.keys
    if penalties.active:
        dense = penalties.counts == "dense"
        if dense or not _choices.fused(logits, filters, penalties.active, slots is not None):
            logits, penalties = fi.penalize_logits(logits, penalties, slots=slots), NO_PENALTIES
    if slots is None or penalties.active or _choices.fused(logits, filters, frozenset(), True):
        return fi.sample(logits, filters, keys, penalties=penalties, slots=slots)
    tokens = fi.sample(logits, step.rows_of(filters), step.row_keys)
    return torch.where(slots < 0, -1, tokens)


def launches_of_draw(logits: Tensor, filters: FilterParams, penalties: PenaltyParams, step: Step) -> list[str]:
    """What ``draw`` launches, a line each."""
    lines = []
    slots, active = step.slots is not None, penalties.active
    if active:
        reason = "dense counts" if penalties.counts == "dense" else _choices.reason(logits, filters, active, slots)
        if reason is not None:
            lines += [f"{line} (not fused: {reason})" for line in launches_of_penalties(logits, penalties)]
            active = frozenset()
    reason = _choices.reason(logits, filters, active, slots) if slots and not active else None
    if reason is not None:
        lines.append(f"gather of parameters, a launch a column (not fused: {reason})")
    chosen = _selection(logits, filters, active, slots and reason is None).entry.full_name
    parts = [*sorted(active), *(("temperature",) if filters.temperature is not None else ()), *sorted(filters.active)]
    return [*lines, f"{chosen} ({', '.join([*parts, 'draw'])})"]


def launches_of_penalties(logits: Tensor, penalties: PenaltyParams) -> list[str]:
    """What ``fi_core.penalize_logits`` launches, a line."""
    given = {"dtype": logits.dtype, "vocab_size": logits.shape[1]}
    parts = penalties.active
    chosen = select_for("penalize_logits", logits.device, **given, parts=parts, counts=penalties.counts)
    return [f"{chosen.entry.full_name} ({', '.join(sorted(parts))})"]
