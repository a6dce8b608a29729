"""Residual addition followed by root mean square layer normalisation, in one pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..library import register
from .arguments import as_rows, check_float, check_like, output_like
from .rmsnorm import check_eps


def _cases() -> Iterator[Case]:
    from .cases.add_rmsnorm import cases

    return cases()


OPERATION = Operation(
    name="add_rmsnorm",
    summary="residual += x in place, then rmsnorm(residual)",
    fields={"dtype": "dtype of x, residual, weight and out", "hidden_size": "length of the last dim"},
    typical={"dtype": torch.bfloat16, "hidden_size": 4096},
    cases=_cases,
)

_dispatch = Dispatcher("add_rmsnorm", "dtype", "hidden_size")


def add_rmsnorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    weight_bias: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Add ``x`` to ``residual`` in place and return the RMS norm of the sum.

    x and residual [..., D] of one dtype, weight [D]; see ``rmsnorm`` for dtypes, strides, eps and weight_bias. The sum
    is computed in float32 (float64 for float64) and rounded to the residual's dtype *before* the norm reads it, so the
    norm is that of the residual stream as stored, the same as an addition followed by ``rmsnorm``. ``out`` [..., D] may
    be x; residual must not overlap x or out. Raises ArgumentError and UnsupportedError.
    """
    check_float("x", x)
    check_like("residual", residual, x, x.shape)
    check_like("weight", weight, x, x.shape[-1:])
    check_eps(eps)
    out = output_like("out", out, x, x.shape)
    rows = (as_rows("x", x), as_rows("residual", residual))
    (_OP if torch.compiler.is_compiling() else _run)(*rows, weight, eps, weight_bias, as_rows("out", out))
    return out


def _run(x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_bias: float, out: Tensor) -> None:
    kernel = _dispatch(x.device, x.dtype, x.shape[-1])
    if x.numel():
        kernel(x, residual, weight, eps, weight_bias, out)


_OP = register(
    "add_rmsnorm(Tensor x, Tensor(a!) residual, Tensor weight, float eps, float weight_bias, Tensor(b!) out) -> ()",
    _run,
)


def cost(num_rows: int, hidden_size: int, dtype: torch.dtype) -> Cost:
    """x read, residual read and written, out written, weight read; one addition an element more than ``rmsnorm``."""
    elements = num_rows * hidden_size
    return Cost((4 * elements + hidden_size) * dtype.itemsize, 5 * elements)
