"""Root mean square layer normalisation over the last dim."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..errors import ArgumentError
from ..library import register
from .arguments import as_rows, check_float, check_like
from .quantised_output import OUT_FORMAT_MEANING, operator_scale, out_format_of, quantised_output


def _cases() -> Iterator[Case]:
    from .cases.rmsnorm import cases

    return cases()


OPERATION = Operation(
    name="rmsnorm",
    summary="x / sqrt(mean(x^2) + eps) * (weight + weight_bias) over the last dim",
    fields={
        "dtype": "dtype of x and weight",
        "hidden_size": "length of the last dim",
        "out_format": OUT_FORMAT_MEANING,
    },
    typical={"dtype": torch.bfloat16, "hidden_size": 4096, "out_format": "same"},
    cases=_cases,
)

_dispatch = Dispatcher("rmsnorm", "dtype", "hidden_size", "out_format")


def check_eps(eps: float) -> None:
    """Raise ArgumentError unless ``eps`` is finite and not negative."""
    if not 0.0 <= eps < float("inf"):
        raise ArgumentError("eps", "a finite number, 0 or more", eps)


def rmsnorm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    weight_bias: float = 0.0,
    scale: float | Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise each row of ``x`` by its root mean square (Zhang and Sennrich, 2019).

    x [..., D] (a per-head norm passes [T, H, D]), float32, float16, bfloat16 or float64, contiguous last dim, any other
    strides (more than 3 dims must collapse to 3 without a copy). weight [D] of x's dtype: one dtype, so every kernel
    serves every call; ``weight_bias`` (1.0 for Gemma, whose weights are stored minus one) is added in the arithmetic
    dtype, float32 (float64 for float64), so it costs no precision. Returns ``out`` [..., D], which may be x itself but
    must not overlap it otherwise.

    With ``out`` of dtype float8_e4m3fn or float8_e5m2, which then must not overlap x, a ``scale`` is needed and only then
    legal: a positive float, or a float32 tensor of one element on x's device, whose value is read there and not checked.
    Stored is the norm in the arithmetic dtype, not rounded to x's before, divided by the scale as IEEE division rounds,
    saturated to the largest finite value and rounded to nearest even; NaN stays NaN (Micikevicius et al., 2022, section 3).

    Raises ArgumentError and UnsupportedError.
    """
    check_float("x", x)
    check_like("weight", weight, x, x.shape[-1:])
    check_eps(eps)
    out = quantised_output(out, scale, x, x.shape)
    rows, out_rows, (tensor, value) = as_rows("x", x), as_rows("out", out), operator_scale(scale)
    (_OP if torch.compiler.is_compiling() else _run)(rows, weight, eps, weight_bias, tensor, value, out_rows)
    return out


def _run(
    x: Tensor,
    weight: Tensor,
    eps: float,
    weight_bias: float,
    scale_tensor: Tensor | None,
    scale: float | None,
    out: Tensor,
) -> None:
    kernel = _dispatch(x.device, x.dtype, x.shape[-1], out_format_of(out))
    if x.numel():
        kernel(x, weight, eps, weight_bias, scale if scale_tensor is None else scale_tensor, out)


_OP = register(
    "rmsnorm(Tensor x, Tensor weight, float eps, float weight_bias, Tensor? scale_tensor, float? scale, Tensor(a!) out)"
    " -> ()",
    _run,
)


def cost(num_rows: int, hidden_size: int, dtype: torch.dtype, out_dtype: torch.dtype | None = None) -> Cost:
    """x read and out (of x's dtype unless given) written once; weight read once; a square-and-add, a scale and a weight
    multiply an element, and with an FP8 output a division."""
    elements = num_rows * hidden_size
    out_bytes = elements * (out_dtype or dtype).itemsize
    return Cost(
        (elements + hidden_size) * dtype.itemsize + out_bytes, (4 if out_dtype in (None, dtype) else 5) * elements
    )
