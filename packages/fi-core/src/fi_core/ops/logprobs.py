"""Log-probabilities of chosen tokens and of the most likely ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..errors import ArgumentError
from ..library import register
from ..sampling import LogprobsOut
from .sampling_arguments import check_logits, check_tensor


def _cases() -> Iterator[Case]:
    from .cases.logprobs import cases

    return cases()


OPERATION = Operation(
    name="logprobs",
    summary="log-softmax at a chosen token and at the n most likely tokens of each row",
    fields={
        "dtype": "dtype of the logits",
        "vocab_size": "tokens of the vocabulary",
        "top_n": "how many of the most likely tokens are returned, 0 or more",
    },
    typical={"dtype": torch.float32, "vocab_size": 128256, "top_n": 5},
    cases=_cases,
)

_dispatch = Dispatcher("logprobs", "dtype", "vocab_size", "top_n")


def logprobs(logits: Tensor, tokens: Tensor, top_n: int = 0) -> LogprobsOut:
    """Log-softmax of logits [N, V] at ``tokens`` int64 [N] and at the ``top_n`` most likely tokens of each row.

    logits float32, float16, bfloat16 or float64 (arithmetic float32, float64 for float64), contiguous last dim;
    0 <= top_n <= V. The most likely tokens are those of ``top_k``: descending logits, ties by lowest index. A token
    outside [0, V) (such as the -1 of an unusable row) has -inf. A row with a NaN, with +inf or without a finite logit
    has NaN for every token inside. Raises ArgumentError and UnsupportedError.
    """
    check_logits("logits", logits)
    num_rows, vocab_size = logits.shape
    check_tensor("tokens", tokens, torch.int64, (num_rows,), logits.device)
    if not isinstance(top_n, int) or not 0 <= top_n <= vocab_size:
        raise ArgumentError("top_n", f"an int from 0 to the vocabulary's {vocab_size}", top_n)
    out = LogprobsOut(
        chosen=torch.empty(num_rows, dtype=torch.float32, device=logits.device),
        values=torch.empty((num_rows, top_n), dtype=torch.float32, device=logits.device),
        indices=torch.empty((num_rows, top_n), dtype=torch.int64, device=logits.device),
    )
    if torch.compiler.is_compiling():
        _OP(logits, tokens, out.chosen, out.values, out.indices)
    else:
        _run(logits, tokens, out)
    return out


def _run(logits: Tensor, tokens: Tensor, out: LogprobsOut) -> None:
    kernel = _dispatch(logits.device, logits.dtype, logits.shape[1], out.values.shape[1])
    if logits.shape[0]:
        kernel(logits, tokens, out)


def _run_flat(logits: Tensor, tokens: Tensor, chosen: Tensor, values: Tensor, indices: Tensor) -> None:
    _run(logits, tokens, LogprobsOut(chosen, values, indices))


_OP = register(
    "logprobs(Tensor logits, Tensor tokens, Tensor(a!) chosen, Tensor(b!) values, Tensor(c!) indices) -> ()", _run_flat
)


def cost(num_rows: int, vocab_size: int, top_n: int, dtype: torch.dtype) -> Cost:
    """The logits read once, a float32 and top_n (float32, int64) pairs written a row; three operations a logit."""
    return Cost(num_rows * (vocab_size * dtype.itemsize + 12 + 12 * top_n), 3 * num_rows * vocab_size)
