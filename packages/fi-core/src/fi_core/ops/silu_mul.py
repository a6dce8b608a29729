"""SiLU of the first half of the last dim, times the second half."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..errors import ArgumentError
from ..library import register
from .arguments import as_rows, check_float, output_like


def _cases() -> Iterator[Case]:
    from .cases.silu_mul import cases

    return cases()


OPERATION = Operation(
    name="silu_mul",
    summary="silu(x[..., :width]) * x[..., width:]",
    fields={"dtype": "dtype of x and out", "width": "half of x's last dim"},
    typical={"dtype": torch.bfloat16, "width": 14336},
    cases=_cases,
)

_dispatch = Dispatcher("silu_mul", "dtype", "width")


def gate_width(x: Tensor) -> int:
    """Half of the last dim of a gated activation's input; ArgumentError when the dim is odd."""
    if x.shape[-1] % 2:
        raise ArgumentError("x", "an even last dim (gate, then up)", tuple(x.shape))
    return x.shape[-1] // 2


def silu_mul(x: Tensor, out: Tensor | None = None) -> Tensor:
    """SwiGLU's elementwise part (Shazeer, 2020): gate * sigmoid(gate) * up.

    x [..., 2 * width]: gate, then up; float32, float16, bfloat16 or float64, contiguous last dim, any other strides
    (more than 3 dims must collapse to 3 without a copy). The arithmetic is float32 (float64 for float64), rounded once.
    Returns ``out`` [..., width], which must not overlap x. Raises ArgumentError and UnsupportedError.
    """
    check_float("x", x)
    width = gate_width(x)
    out = output_like("out", out, x, (*x.shape[:-1], width))
    (_OP if torch.compiler.is_compiling() else _run)(as_rows("x", x), as_rows("out", out))
    return out


def _run(x: Tensor, out: Tensor) -> None:
    kernel = _dispatch(x.device, x.dtype, out.shape[-1])
    if x.numel():
        kernel(x, "none", out)


_OP = register("silu_mul(Tensor x, Tensor(a!) out) -> ()", _run)


def cost(num_rows: int, width: int, dtype: torch.dtype) -> Cost:
    """x read and out written once; an exponential counts as one operation."""
    elements = num_rows * width
    return Cost(3 * elements * dtype.itemsize, 5 * elements)
