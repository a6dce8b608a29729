"""Argument checks and record flattening of penalties and token histories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..sampling import PenaltyParams, TokenHistory
from .sampling_arguments import check_tensor

_HISTORY_NAMES = ("seen", "entries", "num_entries", "num_output")
_BIAS = ("bias_indptr", "bias_tokens", "bias_values")
_PARTS_OF_HISTORY = frozenset({"repetition", "frequency", "presence"})
_NAMES = tuple(item.name for item in fields(PenaltyParams) if item.name != "history")

PENALTY_SCHEMA = ", ".join(f"Tensor? penalty_{name}" for name in (*_NAMES, *_HISTORY_NAMES))
"""Torch schema of a flattened PenaltyParams; the prefix keeps its ``rows`` apart from an operation's own."""
NUM_PENALTY_ARGUMENTS = len(_NAMES) + len(_HISTORY_NAMES)


def flat_penalties(penalties: PenaltyParams) -> tuple[Tensor | None, ...]:
    """``penalties`` in the order of PENALTY_SCHEMA."""
    history = (None,) * len(_HISTORY_NAMES) if penalties.history is None else penalties.history.tensors
    return (*(getattr(penalties, name) for name in _NAMES), *history)


def penalties_of(flat: Sequence[Tensor | None]) -> PenaltyParams:
    """The record that ``flat_penalties`` took apart."""
    named = dict(zip(_NAMES, flat[: len(_NAMES)], strict=True))
    seen, entries, num_entries, num_output = flat[len(_NAMES) :]
    history = None
    if seen is not None and entries is not None and num_entries is not None and num_output is not None:
        history = TokenHistory(seen, entries, num_entries, num_output)
    return PenaltyParams(**named, history=history)


def check_slots(slots: Tensor | None, num_outputs: int, device: torch.device) -> None:
    """Raise ArgumentError unless ``slots`` is None or int64 [num_outputs]."""
    if slots is not None:
        check_tensor("slots", slots, torch.int64, (num_outputs,), device)


def check_history(argument: str, history: TokenHistory, num_rows: int | None, vocab_size: int | None) -> None:
    """Raise ArgumentError unless the tensors of ``history`` fit each other, ``num_rows`` (None: any number) and
    ``vocab_size`` (None: any)."""
    entries = history.entries
    if not isinstance(entries, Tensor) or entries.dim() != 3 or entries.shape[2] != 2 or entries.shape[1] < 1:
        found = tuple(entries.shape) if isinstance(entries, Tensor) else type(entries).__name__
        raise ArgumentError(f"{argument}.entries", "shape [rows, capacity, 2]", found)
    rows = entries.shape[0] if num_rows is None else num_rows
    capacity, device = entries.shape[1], entries.device
    check_tensor(f"{argument}.entries", entries, torch.int32, (rows, capacity, 2), device)
    if capacity > 1 and entries.stride(1) != 2:
        raise ArgumentError(f"{argument}.entries", "entries of a row side by side", f"strides {entries.stride()}")
    words = history.seen.shape[-1] if vocab_size is None else (vocab_size + 31) // 32
    check_tensor(f"{argument}.seen", history.seen, torch.int32, (rows, words), device)
    for name in ("num_entries", "num_output"):
        column = getattr(history, name)
        check_tensor(f"{argument}.{name}", column, torch.int32, (rows,), device)
        if rows > 1 and column.stride(0) != 1:
            raise ArgumentError(f"{argument}.{name}", "a contiguous tensor", f"strides {column.stride()}")


def check_penalties(penalties: PenaltyParams, logits: Tensor, num_outputs: int, slots: Tensor | None) -> None:
    """Raise ArgumentError unless ``penalties`` fit ``num_outputs`` rows of ``logits``; ``slots``: what maps outputs to
    their rows, whose number it leaves open."""
    vocab_size, device = logits.shape[1], logits.device
    words = (vocab_size + 31) // 32
    if penalties.step_allowed is not None:
        shape = (num_outputs, words)
        check_tensor("penalties.step_allowed", penalties.step_allowed, torch.int32, shape, device)
    sized = {"allowed": words, "repetition": None, "frequency": None, "presence": None}
    for name, width in sized.items():
        column = getattr(penalties, name)
        if column is not None:
            dtype = torch.float32 if width is None else torch.int32
            rows = _num_rows(f"penalties.{name}", column, num_outputs, slots)
            check_tensor(f"penalties.{name}", column, dtype, (rows,) if width is None else (rows, width), device)
    _check_bias(penalties, num_outputs, slots, device)
    _check_histories(penalties, logits, num_outputs, slots)


def _num_rows(argument: str, column: Tensor, num_outputs: int, slots: Tensor | None) -> int:
    if slots is None:
        return num_outputs
    if not isinstance(column, Tensor) or column.dim() == 0:
        raise ArgumentError(argument, "a tensor with a place for each slot", type(column).__name__)
    return column.shape[0]


def _check_bias(penalties: PenaltyParams, num_outputs: int, slots: Tensor | None, device: torch.device) -> None:
    parts = {name: getattr(penalties, name) for name in (*_BIAS, "bias_until")}
    if all(part is None for part in parts.values()):
        return
    indptr, tokens, values = penalties.bias_indptr, penalties.bias_tokens, penalties.bias_values
    if indptr is None or tokens is None or values is None:
        missing = [name for name in _BIAS if parts[name] is None]
        raise ArgumentError("penalties.bias_indptr, bias_tokens, bias_values", "all or none", f"without {missing}")
    entries = tokens.shape
    if len(entries) != 1:
        raise ArgumentError("penalties.bias_tokens", "shape [entries]", tuple(entries))
    num_rows = _num_rows("penalties.bias_indptr", indptr, num_outputs + 1, slots)
    check_tensor("penalties.bias_indptr", indptr, torch.int32, (num_rows,), device)
    check_tensor("penalties.bias_tokens", tokens, torch.int32, entries, device)
    check_tensor("penalties.bias_values", values, torch.float32, entries, device)
    if penalties.bias_until is not None:
        check_tensor("penalties.bias_until", penalties.bias_until, torch.int32, entries, device)
        if penalties.history is None:
            raise ArgumentError("penalties.history", "a TokenHistory, for bias_until", None)


def _check_histories(penalties: PenaltyParams, logits: Tensor, num_outputs: int, slots: Tensor | None) -> None:
    prompt, output, history, rows = (
        penalties.prompt_counts,
        penalties.output_counts,
        penalties.history,
        penalties.rows,
    )
    if history is None and output is None and (penalties.frequency is not None or penalties.presence is not None):
        raise ArgumentError("penalties.output_counts", "a tensor, or a history, for frequency and presence", None)
    if history is None and output is None and prompt is None and penalties.repetition is not None:
        raise ArgumentError(
            "penalties.output_counts", "a tensor (or prompt_counts, or a history), for repetition", None
        )
    if rows is not None:
        check_tensor("penalties.rows", rows, torch.int32, (num_outputs,), logits.device)
    free = rows is not None or slots is not None
    for name, counts in (("prompt_counts", prompt), ("output_counts", output)):
        if counts is None:
            continue
        if counts.dim() != 2:
            raise ArgumentError(f"penalties.{name}", "shape [rows, vocabulary]", tuple(counts.shape))
        held = counts.shape[0] if free else num_outputs
        check_tensor(f"penalties.{name}", counts, torch.int32, (held, logits.shape[1]), logits.device)
        if history is not None:
            raise ArgumentError(f"penalties.{name}", "None beside a history", "a tensor")
    if history is not None:
        check_history("penalties.history", history, None if free else num_outputs, logits.shape[1])
        if history.entries.device != logits.device:
            raise ArgumentError("penalties.history.entries.device", str(logits.device), history.entries.device)
    used = penalties.active & _PARTS_OF_HISTORY or penalties.bias_until is not None
    for name in ("prompt_counts", "output_counts", "history", "rows"):
        if getattr(penalties, name) is not None and not used:
            raise ArgumentError(f"penalties.{name}", "None without a penalty that reads it", "a tensor")
    if prompt is not None and penalties.repetition is None:
        raise ArgumentError("penalties.prompt_counts", "None without repetition, which alone reads it", "a tensor")
