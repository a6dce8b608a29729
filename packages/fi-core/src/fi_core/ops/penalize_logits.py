"""Changes of logits that depend on a request's history: allowed tokens, bias and penalties."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..errors import ArgumentError
from ..library import register
from ..sampling import PenaltyParams
from ..settings import settings
from .arguments import call_checked, output_like
from .sampling_arguments import check_logits, check_tensor


def _cases() -> Iterator[Case]:
    from .cases.penalize_logits import cases

    return cases()


OPERATION = Operation(
    name="penalize_logits",
    summary="allowed-token bitmask, logit bias, repetition, frequency and presence penalties, in this order",
    fields={
        "dtype": "dtype of logits and out",
        "vocab_size": "tokens of the vocabulary",
        "parts": "parts that some row uses, of allowed, bias, repetition, frequency, presence",
    },
    typical={
        "dtype": torch.float32,
        "vocab_size": 128256,
        "parts": frozenset({"repetition", "frequency", "presence"}),
    },
    cases=_cases,
)

_dispatch = Dispatcher("penalize_logits", "dtype", "vocab_size", "parts")

_NAMES = (
    "allowed",
    "bias_indptr",
    "bias_tokens",
    "bias_values",
    "repetition",
    "frequency",
    "presence",
    "prompt_counts",
    "output_counts",
    "rows",
)


def penalize_logits(logits: Tensor, penalties: PenaltyParams, out: Tensor | None = None) -> Tensor:
    """Apply ``penalties`` to logits [N, V]; return ``out`` of the same shape and dtype, which may be logits itself.

    The parts and their order are those of ``PenaltyParams``: allowed (bitmask, xgrammar's layout), bias, repetition
    (Keskar et al., 2019, section 4.1), frequency, presence; computed in float32 (float64 for float64) and rounded once.
    Bias entries whose token is outside [0, V) are skipped, so fixed-size rows can be padded with -1. A part needs its
    counts: repetition one of prompt_counts and output_counts, frequency and presence output_counts.
    Raises ArgumentError and UnsupportedError; checked mode (FI_CHECK=1) reports ``rows`` and ``bias_indptr`` that are out
    of range.
    """
    check_logits("logits", logits)
    _check_penalties(penalties, logits)
    out = output_like("out", out, logits, logits.shape)
    if torch.compiler.is_compiling():
        _OP(logits, *(getattr(penalties, name) for name in _NAMES), out)
    else:
        _run(logits, penalties, out)
    return out


def _check_penalties(penalties: PenaltyParams, logits: Tensor) -> None:
    num_rows, vocab_size = logits.shape
    device = logits.device
    if penalties.allowed is not None:
        words = (vocab_size + 31) // 32
        check_tensor("penalties.allowed", penalties.allowed, torch.int32, (num_rows, words), device)
    _check_bias(penalties, num_rows, device)
    for name in ("repetition", "frequency", "presence"):
        column = getattr(penalties, name)
        if column is not None:
            check_tensor(f"penalties.{name}", column, torch.float32, (num_rows,), device)
    _check_counts(penalties, num_rows, vocab_size, device)


def _check_bias(penalties: PenaltyParams, num_rows: int, device: torch.device) -> None:
    parts = (penalties.bias_indptr, penalties.bias_tokens, penalties.bias_values)
    if all(part is None for part in parts):
        return
    if penalties.bias_indptr is None or penalties.bias_tokens is None or penalties.bias_values is None:
        missing = [name for name in _NAMES[1:4] if getattr(penalties, name) is None]
        raise ArgumentError("penalties.bias_indptr, bias_tokens, bias_values", "all or none", f"without {missing}")
    entries = penalties.bias_tokens.shape
    if len(entries) != 1:
        raise ArgumentError("penalties.bias_tokens", "shape [entries]", tuple(entries))
    check_tensor("penalties.bias_indptr", penalties.bias_indptr, torch.int32, (num_rows + 1,), device)
    check_tensor("penalties.bias_tokens", penalties.bias_tokens, torch.int32, entries, device)
    check_tensor("penalties.bias_values", penalties.bias_values, torch.float32, entries, device)


def _check_counts(penalties: PenaltyParams, num_rows: int, vocab_size: int, device: torch.device) -> None:
    prompt, output, rows = penalties.prompt_counts, penalties.output_counts, penalties.rows
    if output is None and (penalties.frequency is not None or penalties.presence is not None):
        raise ArgumentError("penalties.output_counts", "a tensor, for frequency and presence", None)
    if output is None and prompt is None and penalties.repetition is not None:
        raise ArgumentError("penalties.output_counts", "a tensor (or prompt_counts), for repetition", None)
    if rows is not None:
        check_tensor("penalties.rows", rows, torch.int32, (num_rows,), device)
    for name, counts in (("prompt_counts", prompt), ("output_counts", output)):
        if counts is None:
            continue
        if counts.dim() != 2:
            raise ArgumentError(f"penalties.{name}", "shape [rows, vocabulary]", tuple(counts.shape))
        held = counts.shape[0] if rows is not None else num_rows
        check_tensor(f"penalties.{name}", counts, torch.int32, (held, vocab_size), device)
    history = {"repetition", "frequency", "presence"} & penalties.active
    for name in ("prompt_counts", "output_counts", "rows"):
        if getattr(penalties, name) is not None and not history:
            raise ArgumentError(f"penalties.{name}", "None without a penalty that reads it", "a tensor")
    if prompt is not None and penalties.repetition is None:
        raise ArgumentError("penalties.prompt_counts", "None without repetition, which alone reads it", "a tensor")


def _run(logits: Tensor, penalties: PenaltyParams, out: Tensor) -> None:
    if settings().check:
        _check_indices(penalties)
    kernel = _dispatch(logits.device, logits.dtype, logits.shape[1], penalties.active)
    if logits.shape[0]:
        call_checked(kernel, (logits, penalties, out), lambda: _check_indices(penalties))


def _check_indices(penalties: PenaltyParams) -> None:
    from .. import checks

    checks.check_penalties(penalties)


def _run_flat(logits: Tensor, *flat: Any) -> None:
    _run(logits, PenaltyParams(*flat[:-1]), flat[-1])


_OP = register(
    f"penalize_logits(Tensor logits, {', '.join(f'Tensor? {name}' for name in _NAMES)}, Tensor(a!) out) -> ()",
    _run_flat,
)


def cost(num_rows: int, vocab_size: int, num_counts: int, dtype: torch.dtype) -> Cost:
    """Logits read and written, ``num_counts`` (0 to 2) int32 histories read; five operations a logit."""
    elements = num_rows * vocab_size
    return Cost(elements * (2 * dtype.itemsize + 4 * num_counts), 5 * elements)
