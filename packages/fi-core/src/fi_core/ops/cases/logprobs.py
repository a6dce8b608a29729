"""Conformance cases of ``logprobs``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contract import EXACT, Case, Tolerance, Trial
from ...reference.sampling import logprobs
from ...sampling import LogprobsOut
from . import guarded, name_of, poisoned
from .sampling_inputs import RowMaker, flat, huge, masked, noise, single, tied, unusable

_TOLERANCE = Tolerance(1e-5, 2e-5)


@dataclass(frozen=True)
class LogprobsCase:
    """Shape, content and layout; ``after``: foreign elements after each row."""

    name: str
    top_n: int
    vocab_size: int = 97
    num_rows: int = 14
    dtype: torch.dtype = torch.float32
    make: RowMaker = noise
    after: int = 0


def _logprobs_cases() -> Iterator[LogprobsCase]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        yield LogprobsCase(f"plain_{name_of(dtype)}", 5, dtype=dtype)
    for top_n, vocab_size in ((0, 1), (1, 1), (2, 2), (0, 31), (20, 256), (511, 511), (5, 4096), (600, 2000)):
        yield LogprobsCase(f"n{top_n}_v{vocab_size}", top_n, vocab_size, num_rows=3, make=tied)
    for make in (flat, masked, single, huge, unusable):
        yield LogprobsCase(f"{make.__name__}_n5", 5, make=make, vocab_size=130)
    yield LogprobsCase("strided", 3, after=31)
    yield LogprobsCase("one_row", 0, num_rows=1)


def _comparable(chosen: Tensor, values: Tensor, indices: Tensor) -> Mapping[str, Tensor]:
    """Outputs with NaN told apart first, because a NaN never compares equal."""
    found = {"indices": indices}
    for name, tensor in (("chosen", chosen), ("values", values)):
        found[name] = tensor.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        found[f"{name}_nan"] = tensor.isnan().to(torch.int32)
    return found


def _build(case: LogprobsCase, device: torch.device, seed: int) -> Trial:
    generator = torch.Generator().manual_seed(seed)
    logits = case.make(case.num_rows, case.vocab_size, generator).to(case.dtype)
    tokens = torch.randint(0, case.vocab_size, (case.num_rows,), generator=generator)
    if case.num_rows > 2:
        tokens[0], tokens[1] = -1, case.vocab_size
    shape = (case.num_rows, case.top_n)

    def run(kernel: Any) -> Mapping[str, Tensor]:
        given = guarded(logits.shape, case.dtype, device, after=case.after, content=logits.to(device))
        # Infinity, not NaN, is the poison here: NaN is a legal result, +inf is none.
        chosen, values = (torch.full(size, torch.inf, device=device) for size in (shape[:1], shape))
        indices = poisoned(shape, torch.int64, device)
        kernel(given.view, tokens.to(device), LogprobsOut(chosen, values, indices))
        return _comparable(chosen, values, indices)

    def expected() -> Mapping[str, Tensor]:
        chosen, values = (torch.empty(size, dtype=torch.float64) for size in (shape[:1], shape))
        indices = torch.empty(shape, dtype=torch.int64)
        logprobs(logits, tokens, LogprobsOut(chosen, values, indices), compute_dtype=torch.float64)
        return _comparable(chosen, values, indices)

    exact = dict.fromkeys(("indices", "chosen_nan", "values_nan"), EXACT)
    return Trial(run, expected, {"chosen": _TOLERANCE, "values": _TOLERANCE, **exact})


def cases() -> Iterator[Case]:
    """Every case of ``logprobs``."""
    for case in _logprobs_cases():
        hostile_rows = case.make is not noise or case.after % 2
        values = {"dtype": case.dtype, "vocab_size": case.vocab_size, "top_n": case.top_n}
        yield Case(case.name, values, partial(_build, case), frozenset({"hostile"} if hostile_rows else ()))
