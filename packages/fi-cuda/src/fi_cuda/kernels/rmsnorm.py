"""RMSNorm and add_rmsnorm: spec, tuning and binding of ``fi/kernels/rmsnorm.cuh``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..launch import LaunchableKernel
from ..params import ParamsLayout
from ..spec import KernelSpec, kernel_for
from .rows import LaunchForm, aligned_bytes, inner_size, power_of_2_at_least, row_strides

MAX_WIDTH = 16384
_BLOCK_THREADS = 128
_FEW_ROWS = 512


@dataclass(frozen=True)
class RmsNormSpec(KernelSpec):
    """One row width, element type and element type of the output; ``add`` fuses the residual add. ``vector_bytes``: of the
    inputs; the output is stored in as many elements. ``many_rows``: enough to keep the device busy;
    with an add nothing depends on it, and it is not set. ``nested``: rows have an outer and an inner dim."""

    dtype: torch.dtype
    out_dtype: torch.dtype
    width: int
    vector_bytes: int
    add: bool
    many_rows: bool = False
    nested: bool = False

    stem: ClassVar = "rmsnorm"
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (
            ("x", "pointer"),
            ("weight", "pointer"),
            ("scale", "pointer"),
            ("residual", "output"),
            ("out", "output"),
            ("x_strides", "rows"),
            ("residual_strides", "rows"),
            ("out_strides", "rows"),
            ("num_rows", "int64"),
            ("inner_size", "int32"),
            ("eps", "float"),
            ("weight_bias", "float"),
            ("out_scale", "float"),
        )
    )

    @property
    def num_packs(self) -> int:
        """Packs a row."""
        return self.width * self.dtype.itemsize // self.vector_bytes

    @property
    def is_wide(self) -> bool:
        """Whether a thread takes four packs: many rows of more than two packs for each thread of the smallest block. More of
        the smaller blocks, each at another stage, keep memory busy."""
        return self.many_rows and self.num_packs > 2 * _BLOCK_THREADS

    @property
    def threads_per_row(self) -> int:
        """Short rows finish in one round; others take two packs a thread, or four."""
        packs = 1 if self.num_packs <= 32 else 4 if self.is_wide else 2
        return min(512, power_of_2_at_least(-(-self.num_packs // packs)))

    @property
    def num_threads(self) -> int:
        return max(_BLOCK_THREADS, self.threads_per_row)

    def config_lines(self) -> list[str]:
        past_l1 = self.is_wide and self.out_dtype != self.dtype
        return [
            *super().config_lines(),
            f"static constexpr int kThreadsPerRow = {self.threads_per_row};",
            f"static constexpr bool kWeightsLast = {str(self.is_wide).lower()};",
            f"static constexpr bool kPastL1 = {str(past_l1).lower()};",
        ]


@lru_cache(maxsize=4096)
def _form(
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...]],
    addresses: tuple[int, int],
) -> LaunchForm:
    """``dtypes`` and ``addresses`` of the inputs and the output (their bits below 16), ``strides`` of x, residual and out."""
    dtype, out_dtype = dtypes
    x, residual, out = strides
    width, adds = shape[-1], residual is not None
    inputs = (x,) if residual is None else (x, residual)
    if out_dtype == dtype:
        vector = aligned_bytes(addresses[0] | addresses[1], (*inputs, out), width, dtype.itemsize)
    else:
        vector = aligned_bytes(addresses[0], inputs, width, dtype.itemsize)
        vector = min(vector, aligned_bytes(addresses[1], (out,), width, out_dtype.itemsize) * dtype.itemsize)
    rows, inner = math.prod(shape[:-1]), inner_size(shape)
    kernel, rows_per_block = _bound(device, dtypes, width, vector, adds, rows > _FEW_ROWS and not adds, inner > 1)
    others = (0, 0) if residual is None else row_strides(residual)
    sizes = (*row_strides(x), *others, *row_strides(out), rows, inner)
    return LaunchForm(kernel, (rows + rows_per_block - 1) // rows_per_block, sizes)


@lru_cache(maxsize=1024)
def _bound(
    device: torch.device, dtypes: tuple[torch.dtype, torch.dtype], width: int, vector: int, *choices: bool
) -> tuple[LaunchableKernel, int]:
    """The kernel, and its rows a block; ``choices``: the spec's bools in their order."""
    spec = RmsNormSpec(*dtypes, width, vector, *choices)
    return kernel_for(spec, device), spec.num_threads // spec.threads_per_row


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    scalars: tuple[float, float],
    scale: float | Tensor | None,
    out: Tensor,
) -> None:
    device = x.device
    x_address, weight_address, out_address = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    residual_address, residual_strides = 0, None
    if residual is not None:
        residual_address, residual_strides = residual.data_ptr(), residual.stride()
    strides = (x.stride(), residual_strides, out.stride())
    addresses = ((x_address | weight_address | residual_address) & 15, out_address & 15)
    form = _form(device, (x.dtype, out.dtype), x.shape, strides, addresses)
    form.kernel.launch(
        device,
        form.num_blocks,
        1,
        x_address,
        weight_address,
        scale.data_ptr() if isinstance(scale, Tensor) else 0,
        residual_address,
        out_address,
        *form.sizes,
        *scalars,
        scale if isinstance(scale, (int, float)) else 1.0,
    )


def rmsnorm(
    x: Tensor, weight: Tensor, eps: float, weight_bias: float, scale: float | Tensor | None, out: Tensor
) -> None:
    """The ``RMSNorm`` protocol of fi-core, x [rows, D] or [outer, inner, D]."""
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
    """The ``AddRMSNorm`` protocol of fi-core: the sum is rounded to its dtype, stored, and normalised."""
    _launch(x, residual, weight, (eps, weight_bias), scale, out)
