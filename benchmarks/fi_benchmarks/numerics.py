"""Errors against the reference, computed on the device that holds the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from fi_core.contract import EXACT, Tolerance
from torch import Tensor

_SLICE = 1 << 24
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Accuracy:
    """``message`` is None when every output is within its tolerance; the errors are the worst output's: ``rel_rmse`` is
    ||actual - expected|| / ||expected||, ``max_error`` the largest absolute difference."""

    message: str | None
    rel_rmse: float = 0.0
    max_error: float = 0.0


def compare(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> Accuracy:
    """The judgement of ``fi_core.conformance.compare``, made on the device: benchmark outputs are large."""
    if actual.shape != expected.shape:
        return Accuracy(f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    if tolerance == EXACT:
        bits = _BITS[actual.element_size()]
        num_bad = int((actual.contiguous().view(bits) != expected.to(actual.dtype).contiguous().view(bits)).sum())
        return Accuracy(f"{num_bad} of {actual.numel()} elements are not exact" if num_bad else None)
    error_squares = squares = max_error = 0.0
    for got, wanted in zip(actual.flatten().split(_SLICE), expected.flatten().split(_SLICE), strict=True):
        error = got.double() - wanted.double()
        error_squares += float(error.square().sum())
        squares += float(wanted.double().square().sum())
        largest = float(error.abs().max())
        max_error = largest if largest != largest else max(max_error, largest)
    rel_rmse = (error_squares / squares) ** 0.5 if squares else error_squares**0.5
    allowed = tolerance.max_abs * max(1.0, (squares / max(1, actual.numel())) ** 0.5)
    # Written so that NaN fails.
    within = max_error <= allowed and rel_rmse <= tolerance.rel_rmse
    limits = (
        f"rel_rmse {rel_rmse:.3g} (limit {tolerance.rel_rmse:.3g}), max error {max_error:.3g} (limit {allowed:.3g})"
    )
    return Accuracy(None if within else limits, rel_rmse, max_error)


def checker(
    expected: Mapping[str, Tensor], tolerances: Mapping[str, Tolerance]
) -> Callable[[Mapping[str, Tensor]], Accuracy]:
    """A check of the outputs of these names; an implementation may return fewer of them, but not none."""

    def check(outputs: Mapping[str, Tensor]) -> Accuracy:
        if not outputs or set(outputs) - set(expected):
            return Accuracy(f"outputs {sorted(outputs)}, expected some of {sorted(expected)}")
        found = {name: compare(tensor, expected[name], tolerances[name]) for name, tensor in outputs.items()}
        wrong = [f"{name}: {item.message}" for name, item in found.items() if item.message is not None]
        rel_rmse, max_error = (
            max(getattr(item, name) for item in found.values()) for name in ("rel_rmse", "max_error")
        )
        return Accuracy("; ".join(wrong) or None, rel_rmse, max_error)

    return check
