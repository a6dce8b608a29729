"""Residual addition followed by root mean square layer normalisation, in one pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..library import register
from .arguments import as_rows, check_float, check_like
from .quantised_output import OUT_FORMAT_MEANING, operator_scale, out_format_of, quantised_output
from .rmsnorm import check_eps
from .rmsnorm import cost as rmsnorm_cost


def _cases() -> Iterator[Case]:
    from .cases.add_rmsnorm import cases

    return cases()


OPERATION = Operation(
    name="add_rmsnorm",
    summary="residual += x in place, then rmsnorm(residual)",
    fields={
        "dtype": "dtype of x, residual and weight",
        "hidden_size": "length of the last dim",
        "out_format": OUT_FORMAT_MEANING,
    },
    typical={"dtype": torch.bfloat16, "hidden_size": 4096, "out_format": "same"},
    cases=_cases,
)

_dispatch = Dispatcher("add_rmsnorm", "dtype", "hidden_size", "out_format")


def add_rmsnorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    weight_bias: float = 0.0,
    scale: float | Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Add ``x`` to ``residual`` in place and return the RMS norm of the sum.

    x and residual [..., D] of one dtype, weight [D]; see ``rmsnorm`` for dtypes, strides, eps and weight_bias, and for
    FP8 outputs with their ``scale`` (the residual keeps its dtype). The sum
    is computed in float32 (float64 for float64) and rounded to the residual's dtype *before* the norm reads it, so the
    norm is that of the residual stream as stored, the same as an addition followed by ``rmsnorm``. ``out`` [..., D] may
    be x; residual must not overlap x or out. Raises ArgumentError and UnsupportedError.
    """
    check_float("x", x)
    check_like("residual", residual, x, x.shape)
    check_like("weight", weight, x, x.shape[-1:])
    check_eps(eps)
    out = quantised_output(out, scale, x, x.shape)
    rows, out_rows = (as_rows("x", x), as_rows("residual", residual)), as_rows("out", out)
    tensor, value = operator_scale(scale)
    (_OP if torch.compiler.is_compiling() else _run)(*rows, weight, eps, weight_bias, tensor, value, out_rows)
    return out


def _run(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    weight_bias: float,
    scale_tensor: Tensor | None,
    scale: float | None,
    out: Tensor,
) -> None:
    kernel = _dispatch(x.device, x.dtype, x.shape[-1], out_format_of(out))
    if x.numel():
        kernel(x, residual, weight, eps, weight_bias, scale if scale_tensor is None else scale_tensor, out)


_OP = register(
    "add_rmsnorm(Tensor x, Tensor(a!) residual, Tensor weight, float eps, float weight_bias, Tensor? scale_tensor, "
    "float? scale, Tensor(b!) out) -> ()",
    _run,
)


def cost(num_rows: int, hidden_size: int, dtype: torch.dtype, out_dtype: torch.dtype | None = None) -> Cost:
    """``rmsnorm``'s, and the residual read and written, and one addition an element."""
    norm, elements = rmsnorm_cost(num_rows, hidden_size, dtype, out_dtype), num_rows * hidden_size
    return Cost(norm.num_bytes + 2 * elements * dtype.itemsize, norm.num_flops + elements)
