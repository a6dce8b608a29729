"""RMSNorm and residual add fused with RMSNorm (Zhang and Sennrich, 2019): a row is read once and kept in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device
from .quantise_device import quantise
from .row_views import num_rows, row_layout, row_offset

MAX_WIDTH = 16384
"""Widest row that fits in the registers of one program."""

_TILE_ELEMENTS = 1024


@triton.jit
def rmsnorm_kernel(
    x_ptr,
    residual_ptr,  # updated in place; unread unless ADD
    weight_ptr,
    out_ptr,
    scale_ptr,  # what FP8 is divided by, if SCALE_IN_MEMORY
    scale_value,  # what it is divided by if not
    eps,
    weight_bias,
    num_rows,
    width,
    inner_size,
    x_outer_stride,
    x_inner_stride,
    residual_outer_stride,
    residual_inner_stride,
    out_outer_stride,
    out_inner_stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # power of 2, at least width
    ADD: tl.constexpr,
    SCALE_IN_MEMORY: tl.constexpr,
    LIMIT: tl.constexpr,  # largest value of an FP8 output, 0 for others
):
    """Program: ROWS rows; each row is loaded whole before it is stored, so out may be x."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    dim = tl.arange(0, WIDTH)[None, :]
    mask = (row < num_rows) & (dim < width)
    x = tl.load(x_ptr + row_offset(row, inner_size, x_outer_stride, x_inner_stride) + dim, mask=mask, other=0.0)
    x = x.to(tl.float32)
    if ADD:
        place = residual_ptr + row_offset(row, inner_size, residual_outer_stride, residual_inner_stride) + dim
        rounded = (tl.load(place, mask=mask, other=0.0).to(tl.float32) + x).to(residual_ptr.dtype.element_ty)
        tl.store(place, rounded, mask=mask)
        x = rounded.to(tl.float32)
    mean = tl.sum(x * x, axis=1, keep_dims=True) / width
    factor = tl.math.div_rn(tl.full((ROWS, 1), 1.0, tl.float32), tl.sqrt_rn(mean + eps))
    weight = tl.load(weight_ptr + dim, mask=dim < width, other=0.0).to(tl.float32) + weight_bias
    out = out_ptr + row_offset(row, inner_size, out_outer_stride, out_inner_stride) + dim
    scale = tl.full((1, 1), 1.0, tl.float32) * scale_value
    if SCALE_IN_MEMORY:
        scale = tl.load(scale_ptr + tl.zeros((1, 1), tl.int32))
    tl.store(out, quantise(x * factor * weight, scale, LIMIT).to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    scalars: tuple[float, float],
    scale: float | Tensor | None,
    out: Tensor,
) -> None:
    rows, width = num_rows(x), x.shape[-1]
    block_width = triton.next_power_of_2(width)
    block_rows = max(1, min(_TILE_ELEMENTS // block_width, triton.next_power_of_2(rows)))
    other = x if residual is None else residual
    inner_size, x_outer, x_inner = row_layout(x)
    with on_device(x.device):
        rmsnorm_kernel[(triton.cdiv(rows, block_rows),)](
            x,
            other,
            weight,
            out,
            scale if isinstance(scale, Tensor) else weight,
            scale if isinstance(scale, (int, float)) else 1.0,
            *scalars,
            rows,
            width,
            inner_size,
            x_outer,
            x_inner,
            *row_layout(other)[1:],
            *row_layout(out)[1:],
            ROWS=block_rows,
            WIDTH=block_width,
            ADD=residual is not None,
            SCALE_IN_MEMORY=isinstance(scale, Tensor),
            LIMIT=0.0 if scale is None else torch.finfo(out.dtype).max,
            num_warps=min(16, max(4, block_width // 512)),
        )


def rmsnorm(
    x: Tensor, weight: Tensor, eps: float, weight_bias: float, scale: float | Tensor | None, out: Tensor
) -> None:
    """The ``RMSNorm`` protocol, x [rows, D] or [outer, inner, D]: float32 arithmetic, rounded once."""
    _launch(x, None, weight, (eps, weight_bias), scale, out)


def add_rmsnorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    weight_bias: float,
    scale: float | Tensor | None,
    out: Tensor,
) -> None:
    """The ``AddRMSNorm`` protocol: the sum is rounded to the residual's dtype, and that value is normalised."""
    _launch(x, residual, weight, (eps, weight_bias), scale, out)
