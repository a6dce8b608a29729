"""Comparison of a kernel's output with the oracle's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract import EXACT, Tolerance

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Comparison:
    """Outcome of ``compare``: ``message`` is None when the output passes; ``max_error`` is the largest absolute
    difference among finite elements, ``rel_rmse`` ||actual - expected|| / ||expected|| over them."""

    message: str | None
    rel_rmse: float
    max_error: float

    @property
    def passed(self) -> bool:
        return self.message is None


def compare(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> Comparison:
    """Judge ``actual`` by ``tolerance`` (see Tolerance); shapes must be equal, devices may differ.

    With EXACT, ``expected`` is cast to actual's dtype and every bit must agree, the only way in which NaN can pass
    (poison that had to stay). Otherwise NaN fails on either side and infinities must stand at the same places.
    """
    if actual.shape != expected.shape:
        text = f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        return Comparison(text, math.inf, math.inf)
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if actual.numel() == 0:
        return Comparison(None, 0.0, 0.0)
    wide, wanted = actual.to(torch.float64), expected.to(torch.float64)
    finite = wide.isfinite() & wanted.isfinite()
    error = torch.where(finite, wide - wanted, 0.0).abs()
    max_error, rel_rmse = error.max().item(), _relative(error, torch.where(finite, wanted, 0.0))
    if tolerance == EXACT:
        bad = _bits(actual) != _bits(expected.to(actual.dtype))
        limit = "every bit equal"
    else:
        rms = torch.where(finite, wanted, 0.0).square().mean().sqrt().item()
        allowed = tolerance.max_abs * max(1.0, rms)
        bad = (error > allowed) | (~finite & ~(wide == wanted))
        limit = f"|error| <= {allowed:.3g}"
    message = None
    if bad.any():
        message = _first_bad(actual, expected, bad, limit)
    elif rel_rmse > tolerance.rel_rmse and tolerance != EXACT:
        worst = error == error.max()
        message = _first_bad(actual, expected, worst, f"rel_rmse <= {tolerance.rel_rmse:.3g}, the largest error")
    if message is not None:
        message += f"; rel_rmse {rel_rmse:.3g}, max error {max_error:.3g}"
    return Comparison(message, rel_rmse, max_error)


def _relative(error: Tensor, wanted: Tensor) -> float:
    distance, length = error.norm().item(), wanted.norm().item()
    if distance == 0.0:
        return 0.0
    return distance / length if length else math.inf


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def _first_bad(actual: Tensor, expected: Tensor, bad: Tensor, limit: str) -> str:
    flat = int(bad.flatten().nonzero()[0].item())
    index = tuple(int(item) for item in torch.unravel_index(torch.tensor(flat), actual.shape))
    found, wanted = actual.flatten()[flat].item(), expected.flatten()[flat].item()
    count = int(bad.sum().item())
    return f"first bad at {index}: actual {found!r}, expected {wanted!r} ({limit}; {count} of {actual.numel()} bad)"
