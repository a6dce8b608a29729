"""The k largest logits of each row with their indices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..errors import ArgumentError
from ..library import register
from .sampling_arguments import check_logits


def _cases() -> Iterator[Case]:
    from .cases.top_k import cases

    return cases()


OPERATION = Operation(
    name="top_k",
    summary="the k largest values of each row, descending, ties by lowest index",
    fields={
        "dtype": "dtype of the logits",
        "vocab_size": "length of a row",
        "k": "how many values a row",
    },
    typical={"dtype": torch.float32, "vocab_size": 128256, "k": 64},
    cases=_cases,
)

_dispatch = Dispatcher("top_k", "dtype", "vocab_size", "k")


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values float32 [N, k] and indices int64 [N, k] of the k largest of each row of logits [N, V], 1 <= k <= V.

    Descending, ties by lowest index, hence unique. logits float32, float16, bfloat16 or float64 (read as float32),
    contiguous last dim. A NaN counts as -inf (and is returned as -inf). Raises ArgumentError and UnsupportedError.
    """
    check_logits("logits", logits)
    num_rows, vocab_size = logits.shape
    if not isinstance(k, int) or not 1 <= k <= vocab_size:
        raise ArgumentError("k", f"an int from 1 to the row length {vocab_size}", k)
    values = torch.empty((num_rows, k), dtype=torch.float32, device=logits.device)
    indices = torch.empty((num_rows, k), dtype=torch.int64, device=logits.device)
    (_OP if torch.compiler.is_compiling() else _run)(logits, values, indices)
    return values, indices


def _run(logits: Tensor, values: Tensor, indices: Tensor) -> None:
    kernel = _dispatch(logits.device, logits.dtype, logits.shape[1], values.shape[1])
    if logits.shape[0]:
        kernel(logits, values, indices)


_OP = register("top_k(Tensor logits, Tensor(a!) values, Tensor(b!) indices) -> ()", _run)


def cost(num_rows: int, vocab_size: int, k: int, dtype: torch.dtype) -> Cost:
    """The logits read once, k float32 values and int64 indices written a row; a comparison a logit."""
    return Cost(num_rows * (vocab_size * dtype.itemsize + 12 * k), num_rows * vocab_size)
