"""FP8 outputs of norms, as FP8 matrix products with static per-tensor scales read them: format, scale and their checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError
from .arguments import check_like, output_like

OUT_FORMATS: dict[str, torch.dtype | None] = {
    "same": None,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""Values of the request field ``out_format`` and their dtypes (None: that of x)."""

OUT_FORMAT_MEANING = "'same' (out has x's dtype), 'fp8_e4m3' or 'fp8_e5m2'"
"""What the request field says."""

_FORMAT_NAMES = {dtype: name for name, dtype in OUT_FORMATS.items() if dtype is not None}
_SMALLEST, _LARGEST = 2.0**-149, torch.finfo(torch.float32).max
"""Positive, finite float32 numbers."""


def out_format_of(out: Tensor) -> str:
    """The request's ``out_format`` for a checked ``out``."""
    return _FORMAT_NAMES.get(out.dtype, "same")


def operator_scale(scale: float | Tensor | None) -> tuple[Tensor | None, float | None]:
    """``scale`` as the two arguments that an operator's schema has for it."""
    return (scale, None) if isinstance(scale, Tensor) else (None, scale)


def quantised_output(out: Tensor | None, scale: float | Tensor | None, x: Tensor, shape: Sequence[int]) -> Tensor:
    """``out`` of ``shape`` after its checks, or a new tensor of x's dtype when it is None.

    Raises ArgumentError for an FP8 ``out`` without ``scale``, a ``scale`` without one, and a scale that is not a positive,
    finite float32 number or a float32 tensor of one element on x's device. A tensor's value is not read.
    """
    if out is None or out.dtype not in _FORMAT_NAMES:
        if scale is not None:
            given = "no out" if out is None else f"out of {out.dtype}"
            raise ArgumentError("scale", "None unless out is float8_e4m3fn or float8_e5m2", f"a scale and {given}")
        return output_like("out", out, x, shape)
    if isinstance(scale, Tensor):
        if scale.dtype != torch.float32:
            raise ArgumentError("scale.dtype", "torch.float32", scale.dtype)
        if scale.device != x.device:
            raise ArgumentError("scale.device", str(x.device), scale.device)
        if scale.numel() != 1:
            raise ArgumentError("scale", "one element", f"shape {tuple(scale.shape)}")
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)) or not _SMALLEST <= scale <= _LARGEST:
        expected = "a positive, finite float32 number or a tensor of one element, as out is FP8"
        raise ArgumentError("scale", expected, repr(scale))
    check_like("out", out, x, shape, out.dtype)
    return out
