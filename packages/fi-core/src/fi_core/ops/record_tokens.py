"""Drawn tokens into the histories that penalties read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..errors import ArgumentError
from ..library import register
from ..sampling import TokenHistory
from ..settings import settings
from .arguments import call_checked
from .penalty_arguments import check_history, check_slots
from .sampling_arguments import check_tensor


def _cases() -> Iterator[Case]:
    from .cases.record_tokens import cases

    return cases()


OPERATION = Operation(
    name="record_tokens",
    summary="count drawn tokens into sparse histories of prompts and outputs",
    fields={"capacity": "distinct output tokens for which a row has room"},
    typical={"capacity": 4096},
    cases=_cases,
)

_dispatch = Dispatcher("record_tokens", "capacity")


def record_tokens(history: TokenHistory, tokens: Tensor, *, slots: Tensor | None = None) -> None:
    """Append tokens int64 [N, k] (or [N]) to the outputs in ``history``, in place; row n to row ``slots[n]`` (int64 [N],
    each at most once; None: n), none where that is below 0. Tokens outside the vocabulary of ``history.seen`` (-1, as
    ``sample`` gives for an unusable row) are skipped.

    Each token's bit in ``seen`` is set, its entry counted up or appended, and ``num_output`` counted up. Where no room is
    left for a new entry, ``num_entries`` becomes one more than the capacity and the entries stay.
    Device work only, legal in a CUDA graph. Raises ArgumentError and UnsupportedError; checked mode (FI_CHECK=1)
    reports ``slots`` that are out of range.
    """
    check_history("history", history, None, None)
    tokens = tokens.unsqueeze(1) if tokens.dim() == 1 else tokens
    num_rows, device = history.entries.shape[0], history.entries.device
    if tokens.dim() != 2:
        raise ArgumentError("tokens", "shape [N] or [N, k]", tuple(tokens.shape))
    check_tensor("tokens", tokens, torch.int64, tokens.shape, device)
    check_slots(slots, tokens.shape[0], device)
    if slots is None and tokens.shape[0] != num_rows:
        raise ArgumentError("tokens", f"a row for each of the history's {num_rows}", tuple(tokens.shape))
    if torch.compiler.is_compiling():
        _OP(*history.tensors, tokens, slots)
    else:
        _run(history, tokens, slots)


def _run(history: TokenHistory, tokens: Tensor, slots: Tensor | None) -> None:
    num_rows, capacity = history.entries.shape[:2]

    def check() -> None:
        from .. import checks

        if slots is not None:
            checks.check_slots(slots, num_rows)

    if settings().check:
        check()
    kernel = _dispatch(tokens.device, capacity)
    if tokens.numel():
        call_checked(kernel, (history, tokens, slots), check)


def _run_flat(*flat: Any) -> None:
    _run(TokenHistory(*flat[:4]), *flat[4:])


_OP = register(
    "record_tokens(Tensor(a!) seen, Tensor(b!) entries, Tensor(c!) num_entries, Tensor(d!) num_output, Tensor tokens, "
    "Tensor? slots) -> ()",
    _run_flat,
)


def cost(num_rows: int, num_tokens: int, num_entries: int) -> Cost:
    """``num_tokens`` a row looked up among ``num_entries`` entries, and a few words written for each."""
    return Cost(num_rows * (8 * num_entries + 24 * num_tokens), num_rows * num_tokens * num_entries)
