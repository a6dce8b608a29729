"""GELU of the first half of the last dim, times the second half."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..errors import ArgumentError
from ..library import register
from .arguments import as_rows, check_float, output_like
from .silu_mul import gate_width


def _cases() -> Iterator[Case]:
    from .cases.gelu_mul import cases

    return cases()


OPERATION = Operation(
    name="gelu_mul",
    summary="gelu(x[..., :width]) * x[..., width:]",
    fields={
        "dtype": "dtype of x and out",
        "width": "half of x's last dim",
        "approximate": "'none' (error function) or 'tanh'",
    },
    typical={"dtype": torch.bfloat16, "width": 14336, "approximate": "tanh"},
    cases=_cases,
)

_dispatch = Dispatcher("gelu_mul", "dtype", "width", "approximate")


def gelu_mul(x: Tensor, approximate: str = "tanh", out: Tensor | None = None) -> Tensor:
    """GEGLU's elementwise part (Shazeer, 2020): gelu(gate) * up, with GELU as in Hendrycks and Gimpel (2016).

    x [..., 2 * width]: gate, then up; see ``silu_mul`` for dtypes, strides and arithmetic. ``approximate``: "none" uses
    the error function, "tanh" the tanh formula. Returns ``out`` [..., width], which must not overlap x. Raises
    ArgumentError and UnsupportedError.
    """
    check_float("x", x)
    if approximate not in ("none", "tanh"):
        raise ArgumentError("approximate", "'none' or 'tanh'", approximate)
    out = output_like("out", out, x, (*x.shape[:-1], gate_width(x)))
    (_OP if torch.compiler.is_compiling() else _run)(as_rows("x", x), approximate, as_rows("out", out))
    return out


def _run(x: Tensor, approximate: str, out: Tensor) -> None:
    kernel = _dispatch(x.device, x.dtype, out.shape[-1], approximate)
    if x.numel():
        kernel(x, approximate, out)


_OP = register("gelu_mul(Tensor x, str approximate, Tensor(a!) out) -> ()", _run)


def cost(num_rows: int, width: int, dtype: torch.dtype) -> Cost:
    """x read and out written once; erf or tanh counts as one operation."""
    elements = num_rows * width
    return Cost(3 * elements * dtype.itemsize, 9 * elements)
