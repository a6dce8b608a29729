"""Gated activations: act(gate) * up for SiLU and GELU (Shazeer, 2020; Hendrycks and Gimpel, 2016)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device
from .row_views import num_rows, row_layout, row_offset

_MAX_BLOCK = 1024


@triton.jit
def gated_kernel(
    x_ptr,
    out_ptr,
    width,
    inner_size,
    x_outer_stride,
    x_inner_stride,
    out_outer_stride,
    out_inner_stride,
    ACTIVATION: tl.constexpr,  # "silu", "gelu" or "gelu_tanh"
    BLOCK: tl.constexpr,
):
    """Program (row, block of columns)."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    source = x_ptr + row_offset(row, inner_size, x_outer_stride, x_inner_stride) + column
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        activated = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        activated = 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    else:
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)): no tanh needed and no cancellation for negative gates.
        twice_u = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        activated = gate / (1.0 + tl.exp(-twice_u))
    target = out_ptr + row_offset(row, inner_size, out_outer_stride, out_inner_stride) + column
    tl.store(target, (activated * up).to(out_ptr.dtype.element_ty), mask=mask)


def _launch(x: Tensor, out: Tensor, activation: str) -> None:
    width = out.shape[-1]
    block = min(_MAX_BLOCK, triton.next_power_of_2(width))
    with on_device(x.device):
        gated_kernel[(num_rows(x), triton.cdiv(width, block))](
            x,
            out,
            width,
            *row_layout(x),
            *row_layout(out)[1:],
            ACTIVATION=activation,
            BLOCK=block,
        )


def silu_mul(x: Tensor, approximate: str, out: Tensor) -> None:
    """The ``GatedActivation`` protocol of ``silu_mul``; x [rows, 2 * width] or [outer, inner, 2 * width]."""
    assert approximate == "none", approximate
    _launch(x, out, "silu")


def gelu_mul(x: Tensor, approximate: str, out: Tensor) -> None:
    """The ``GatedActivation`` protocol of ``gelu_mul``."""
    _launch(x, out, "gelu" if approximate == "none" else "gelu_tanh")
