"""Root mean square layer normalisation over the last dim."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..errors import ArgumentError
from ..library import register
from .arguments import as_rows, check_float, check_like, output_like


def _cases() -> Iterator[Case]:
    from .cases.rmsnorm import cases

    return cases()


OPERATION = Operation(
    name="rmsnorm",
    summary="x / sqrt(mean(x^2) + eps) * (weight + weight_bias) over the last dim",
    fields={"dtype": "dtype of x, weight and out", "hidden_size": "length of the last dim"},
    typical={"dtype": torch.bfloat16, "hidden_size": 4096},
    cases=_cases,
)

_dispatch = Dispatcher("rmsnorm", "dtype", "hidden_size")


def check_eps(eps: float) -> None:
    """Raise ArgumentError unless ``eps`` is finite and not negative."""
    if not 0.0 <= eps < float("inf"):
        raise ArgumentError("eps", "a finite number, 0 or more", eps)


def rmsnorm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, weight_bias: float = 0.0, out: Tensor | None = None
) -> Tensor:
    """Normalise each row of ``x`` by its root mean square (Zhang and Sennrich, 2019).

    x [..., D] (a per-head norm passes [T, H, D]), float32, float16, bfloat16 or float64, contiguous last dim, any other
    strides (more than 3 dims must collapse to 3 without a copy). weight [D] of x's dtype: one dtype, so every kernel
    serves every call; ``weight_bias`` (1.0 for Gemma, whose weights are stored minus one) is added in the arithmetic
    dtype, float32 (float64 for float64), so it costs no precision. Returns ``out`` [..., D], which may be x itself but
    must not overlap it otherwise. Raises ArgumentError and UnsupportedError.
    """
    check_float("x", x)
    check_like("weight", weight, x, x.shape[-1:])
    check_eps(eps)
    out = output_like("out", out, x, x.shape)
    (_OP if torch.compiler.is_compiling() else _run)(as_rows("x", x), weight, eps, weight_bias, as_rows("out", out))
    return out


def _run(x: Tensor, weight: Tensor, eps: float, weight_bias: float, out: Tensor) -> None:
    kernel = _dispatch(x.device, x.dtype, x.shape[-1])
    if x.numel():
        kernel(x, weight, eps, weight_bias, out)


_OP = register("rmsnorm(Tensor x, Tensor weight, float eps, float weight_bias, Tensor(a!) out) -> ()", _run)


def cost(num_rows: int, hidden_size: int, dtype: torch.dtype) -> Cost:
    """x read and out written once; weight read once; a square-and-add, a scale and a weight multiply an element."""
    elements = num_rows * hidden_size
    return Cost((2 * elements + hidden_size) * dtype.itemsize, 4 * elements)
