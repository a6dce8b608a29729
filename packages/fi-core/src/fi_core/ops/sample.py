"""Draw one token a row from logits: temperature, filters and an inverse-CDF draw with keyed random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..errors import ArgumentError
from ..library import register
from ..sampling import NO_PENALTIES, DrawKeys, FilterParams, PenaltyParams
from ..settings import settings
from .arguments import call_checked
from .penalty_arguments import PENALTY_SCHEMA, check_penalties, check_slots, flat_penalties, penalties_of
from .sampling_arguments import (
    FILTER_SCHEMA,
    KEY_SCHEMA,
    NUM_FILTER_ARGUMENTS,
    check_filters,
    check_keys,
    check_logits,
    check_tensor,
    flat_filters,
    flat_keys,
    tensor_or_new,
)


def _cases() -> Iterator[Case]:
    from .cases.sample import cases

    return cases()


OPERATION = Operation(
    name="sample",
    summary="draw a token a row: temperature, top-k, top-p, min-p, typical-p and an exact keyed inverse-CDF draw",
    fields={
        "dtype": "dtype of the logits",
        "vocab_size": "tokens of the vocabulary",
        "filters": "filters that some row uses, of top_k, top_p, min_p, typical_p",
        "order": "'sequential' (each on what the previous ones left) or 'joint' (each on the whole, intersected)",
        "penalties": "changes of the logits before, of allowed, bias, repetition, frequency, presence",
        "slots": "whether the parameters lie in columns from which slots pick",
    },
    typical={
        "dtype": torch.float32,
        "vocab_size": 128256,
        "filters": frozenset({"top_k", "top_p"}),
        "order": "sequential",
        "penalties": frozenset(),
        "slots": False,
    },
    cases=_cases,
)

_dispatch = Dispatcher("sample", "dtype", "vocab_size", "filters", "order", "penalties", "slots")


def sample(
    logits: Tensor,
    filters: FilterParams,
    keys: DrawKeys,
    *,
    penalties: PenaltyParams = NO_PENALTIES,
    rows: Tensor | None = None,
    slots: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Draw tokens int64 [N] from logits [R, V]; output n uses row ``rows[n]`` (int32 or int64 [N], repeats allowed;
    None: row n, N = R).

    logits float32, float16, bfloat16 or float64 (read as float32), contiguous last dim, 1 <= V <= 2^19. ``out``, if
    given, receives the tokens. A token depends on its own row, parameters and key alone, never on the batch around it.
    Output n uses row n of ``filters``, ``keys`` and ``penalties``, or with ``slots`` int64 [N] row ``slots[n]`` (below 0:
    the token is -1) but for ``keys.position``, ``penalties.step_allowed`` and ``penalties.rows``: parameters then lie in
    columns with a place for each request in flight. ``penalties`` change the logits first, rounded to their dtype, as
    ``penalize_logits`` does; they take a ``history``, not dense counts.

    Definition, the same for every back end. The only inexact step is the exponential of step 2, so two kernels may
    differ only where a random number or a filter's limit falls within its rounding of a boundary.

    1. l' = float32(l) / temperature (IEEE division). A row in which some l' is NaN or +inf, or none is finite, and one
       with a parameter out of its range (``FilterParams``) gives -1. Temperature 0 gives the first index of the largest
       logit and ignores the filters.
    2. c = max(l') - l', w = exp(-c) in float32; mass = int64(w * 2^32), truncated. Everything after this is integers.
    3. Rank order is l' descending, then index ascending. top_k keeps the first k. top_p keeps a token iff the mass
       before it in rank order is below floor(P * M / 2^31), P = round(top_p * 2^31), M the mass of the tokens
       considered; the first token stays. min_p keeps w >= min_p. typical_p (Meister et al., 2023) ranks by float32 |c -
       E| ascending, then index, E = float32(sum(int64(w * c * 2^32)) / M) (a float64 quotient; |c - E| is | -log p -
       entropy|), and keeps as top_p does. "sequential": in this order, each on the tokens that the previous ones left;
       "joint": each on all tokens, intersected. If no mass is left, the first token in rank order alone is kept.
    4. R is the 62-bit random number of (seed, sample, position, purpose 0) (``fi_core.random``), M the kept mass: the
       token is the first kept index, in index order, whose inclusive cumulative mass exceeds floor(R * M / 2^62).

    Raises ArgumentError and UnsupportedError; checked mode (FI_CHECK=1) reports ``rows``, ``slots`` and
    ``penalties.rows`` that are out of range.
    """
    check_logits("logits", logits)
    num_outputs = _num_outputs(keys, slots)
    check_slots(slots, num_outputs, logits.device)
    check_keys(keys, num_outputs, logits.device, slots)
    check_filters(filters, num_outputs, logits.device, slots)
    check_penalties(penalties, logits, num_outputs, slots)
    if penalties.counts == "dense":
        raise ArgumentError("penalties.history", "a TokenHistory in place of dense counts", penalties.history)
    _check_source(logits, rows, num_outputs, slots)
    tokens = tensor_or_new("out", out, torch.int64, (num_outputs,), logits.device)
    if torch.compiler.is_compiling():
        _OP(logits, *flat_filters(filters), *flat_keys(keys), *flat_penalties(penalties), rows, slots, tokens)
    else:
        _run(logits, filters, keys, penalties, (rows, slots), tokens)
    return tokens


def _num_outputs(keys: DrawKeys, slots: Tensor | None) -> int:
    counted = keys.seed if slots is None else slots
    return counted.shape[0] if counted.dim() else 0


def _check_source(logits: Tensor, rows: Tensor | None, num_outputs: int, slots: Tensor | None) -> None:
    """Raise ArgumentError unless every output has a row of logits."""
    if rows is not None:
        if rows.dtype not in (torch.int32, torch.int64):
            raise ArgumentError("rows.dtype", "int32 or int64", rows.dtype)
        check_tensor("rows", rows, rows.dtype, (num_outputs,), logits.device)
        if num_outputs and not logits.shape[0]:
            raise ArgumentError("rows", "no rows, as logits has none", f"{num_outputs} rows")
    elif num_outputs != logits.shape[0]:
        named = "keys.seed" if slots is None else "slots"
        raise ArgumentError(named, f"shape ({logits.shape[0]},), one for each row of logits", (num_outputs,))


def _run(
    logits: Tensor,
    filters: FilterParams,
    keys: DrawKeys,
    penalties: PenaltyParams,
    places: tuple[Tensor | None, Tensor | None],
    tokens: Tensor,
) -> None:
    rows, slots = places

    def check() -> None:
        from .. import checks

        if rows is not None:
            checks.check_rows("rows", rows, logits.shape[0])
        if slots is not None:
            checks.check_slots(slots, keys.seed.shape[0])
        checks.check_penalties(penalties, slots)

    if settings().check:
        check()
    values = (logits.dtype, logits.shape[1], filters.active, filters.order, penalties.active, slots is not None)
    kernel = _dispatch(logits.device, *values)
    if tokens.shape[0]:
        call_checked(kernel, (logits, filters, keys, rows, tokens, penalties, slots), check)


def _run_flat(logits: Tensor, *flat: Any) -> None:
    filters, rest = FilterParams(*flat[:NUM_FILTER_ARGUMENTS]), flat[NUM_FILTER_ARGUMENTS:]
    _run(logits, filters, DrawKeys(*rest[:3]), penalties_of(rest[3:-3]), rest[-3:-1], rest[-1])


_OP = register(
    f"sample(Tensor logits, {FILTER_SCHEMA}, {KEY_SCHEMA}, {PENALTY_SCHEMA}, Tensor? rows, Tensor? slots, "
    "Tensor(a!) tokens) -> ()",
    _run_flat,
)


def cost(num_rows: int, vocab_size: int, dtype: torch.dtype) -> Cost:
    """The logits read once and a token written a row; a division, an exponential and two additions a logit."""
    elements = num_rows * vocab_size
    return Cost(elements * dtype.itemsize + 8 * num_rows, 4 * elements)
