"""Temperature and filters without the draw: masked logits or renormalised probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..errors import ArgumentError
from ..library import register
from ..sampling import FilterParams
from .sampling_arguments import FILTER_SCHEMA, check_filters, check_logits, flat_filters, tensor_or_new


def _cases() -> Iterator[Case]:
    from .cases.filter_logits import cases

    return cases()


OPERATION = Operation(
    name="filter_logits",
    summary="apply temperature and filters: masked logits, or probabilities renormalised over what is kept",
    fields={
        "dtype": "dtype of the logits",
        "vocab_size": "tokens of the vocabulary",
        "filters": "filters that some row uses, of top_k, top_p, min_p, typical_p",
        "order": "'sequential' (each on what the previous ones left) or 'joint' (each on the whole, intersected)",
        "kind": "output: 'logits' or 'probs'",
    },
    typical={
        "dtype": torch.float32,
        "vocab_size": 128256,
        "filters": frozenset({"top_k", "top_p"}),
        "order": "sequential",
        "kind": "probs",
    },
    cases=_cases,
)

_dispatch = Dispatcher("filter_logits", "dtype", "vocab_size", "filters", "order", "kind")


def filter_logits(logits: Tensor, filters: FilterParams, kind: str = "probs", out: Tensor | None = None) -> Tensor:
    """Apply temperature and filters to logits [N, V] as ``sample`` does; return ``out`` float32 [N, V].

    kind "logits": l' = float32(l) / temperature where a token is kept, -inf elsewhere. kind "probs": mass / (kept mass)
    where kept (the fixed-point masses of ``sample``, so a token below 2^-32 of the largest has 0), 0 elsewhere.
    Temperature 0: the first index of the largest logit alone is kept, l' = l there and its probability is 1. An
    unusable row (NaN, +inf, no finite logit, a parameter out of its range) gives logits all -inf and probabilities
    all 0, so that a draw from it gives -1.

    logits and filters as in ``sample``; ``out`` may be float32 logits themselves. Raises ArgumentError and
    UnsupportedError.
    """
    check_logits("logits", logits)
    check_filters(filters, logits.shape[0], logits.device)
    if kind not in ("logits", "probs"):
        raise ArgumentError("kind", "'logits' or 'probs'", repr(kind))
    out = tensor_or_new("out", out, torch.float32, logits.shape, logits.device)
    if torch.compiler.is_compiling():
        _OP(logits, *flat_filters(filters), kind, out)
    else:
        _run(logits, filters, kind, out)
    return out


def _run(logits: Tensor, filters: FilterParams, kind: str, out: Tensor) -> None:
    kernel = _dispatch(logits.device, logits.dtype, logits.shape[1], filters.active, filters.order, kind)
    if logits.shape[0]:
        kernel(logits, filters, kind, out)


def _run_flat(logits: Tensor, *flat: Any) -> None:
    _run(logits, FilterParams(*flat[:-2]), *flat[-2:])


_OP = register(f"filter_logits(Tensor logits, {FILTER_SCHEMA}, str kind, Tensor(a!) out) -> ()", _run_flat)


def cost(num_rows: int, vocab_size: int, dtype: torch.dtype) -> Cost:
    """The logits read and float32 values written once; a division, an exponential and two more operations a logit."""
    elements = num_rows * vocab_size
    return Cost(elements * (dtype.itemsize + 4), 4 * elements)
