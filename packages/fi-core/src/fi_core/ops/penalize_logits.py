"""Changes of logits that depend on a request's history: allowed tokens, bias and penalties."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..library import register
from ..sampling import PenaltyParams
from ..settings import settings
from .arguments import call_checked, output_like
from .penalty_arguments import (
    NUM_PENALTY_ARGUMENTS,
    PENALTY_SCHEMA,
    check_penalties,
    check_slots,
    flat_penalties,
    penalties_of,
)
from .sampling_arguments import check_logits


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
        "counts": "the tokens of prompt and output: 'none', 'dense' ([R, V] counts) or 'sparse' (a TokenHistory)",
    },
    typical={
        "dtype": torch.float32,
        "vocab_size": 128256,
        "parts": frozenset({"repetition", "frequency", "presence"}),
        "counts": "sparse",
    },
    cases=_cases,
)

_dispatch = Dispatcher("penalize_logits", "dtype", "vocab_size", "parts", "counts")


def penalize_logits(
    logits: Tensor, penalties: PenaltyParams, out: Tensor | None = None, *, slots: Tensor | None = None
) -> Tensor:
    """Apply ``penalties`` to logits [N, V]; return ``out`` of the same shape and dtype, which may be logits itself.

    The parts and their order are those of ``PenaltyParams``: allowed (bitmask, xgrammar's layout), bias, repetition
    (Keskar et al., 2019, section 4.1), frequency, presence; computed in float32 (float64 for float64) and rounded once.
    Bias entries whose token is outside [0, V) are skipped, so fixed-size rows can be padded with -1. A part needs its
    counts or a history: repetition one of prompt_counts and output_counts, frequency and presence output_counts. ``slots``
    int64 [N]: which rows of ``penalties`` row n uses (None: n); below 0: none, the row is copied. A row whose
    history's output did not fit becomes -inf, so that nothing is drawn from it, unless its frequency and presence are 0.
    Raises ArgumentError and UnsupportedError; checked mode (FI_CHECK=1) reports ``rows``, ``slots`` and ``bias_indptr``
    that are out of range.
    """
    check_logits("logits", logits)
    check_slots(slots, logits.shape[0], logits.device)
    check_penalties(penalties, logits, logits.shape[0], slots)
    out = output_like("out", out, logits, logits.shape)
    if torch.compiler.is_compiling():
        _OP(logits, *flat_penalties(penalties), slots, out)
    else:
        _run(logits, penalties, out, slots)
    return out


def _run(logits: Tensor, penalties: PenaltyParams, out: Tensor, slots: Tensor | None) -> None:
    if settings().check:
        _check_indices(penalties, slots)
    kernel = _dispatch(logits.device, logits.dtype, logits.shape[1], penalties.active, penalties.counts)
    if logits.shape[0]:
        call_checked(kernel, (logits, penalties, out, slots), lambda: _check_indices(penalties, slots))


def _check_indices(penalties: PenaltyParams, slots: Tensor | None) -> None:
    from .. import checks

    checks.check_penalties(penalties, slots)


def _run_flat(logits: Tensor, *flat: Any) -> None:
    _run(logits, penalties_of(flat[:NUM_PENALTY_ARGUMENTS]), flat[-1], flat[-2])


_OP = register(f"penalize_logits(Tensor logits, {PENALTY_SCHEMA}, Tensor? slots, Tensor(a!) out) -> ()", _run_flat)


def cost(num_rows: int, vocab_size: int, num_counts: int, dtype: torch.dtype) -> Cost:
    """Logits read and written, ``num_counts`` (0 to 2) int32 histories read; five operations a logit."""
    elements = num_rows * vocab_size
    return Cost(elements * (2 * dtype.itemsize + 4 * num_counts), 5 * elements)
