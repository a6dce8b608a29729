"""RMSNorm and add_rmsnorm: spec, tuning and binding of ``fi/kernels/rmsnorm.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..launch import LaunchableKernel
from ..params import ParamsLayout
from ..spec import KernelSpec, kernel_for
from .rows import inner_size, num_rows, power_of_2_at_least, row_strides, vector_bytes

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
    rows, width, device = num_rows(x), x.shape[-1], x.device
    inputs = (x, weight) if residual is None else (x, weight, residual)
    if scale is None:
        vector = vector_bytes(*inputs, out, multiple_of=width)
    else:
        vector = vector_bytes(*inputs, multiple_of=width)
        vector = min(vector, vector_bytes(out, multiple_of=width) * x.element_size())
    adds, inner = residual is not None, inner_size(x)
    choices = (adds, rows > _FEW_ROWS and not adds, inner > 1)
    kernel, rows_per_block = _bound(device, (x.dtype, out.dtype), width, vector, *choices)
    kernel.launch(
        device,
        (rows + rows_per_block - 1) // rows_per_block,
        1,
        x.data_ptr(),
        weight.data_ptr(),
        scale.data_ptr() if isinstance(scale, Tensor) else 0,
        0 if residual is None else residual.data_ptr(),
        out.data_ptr(),
        *row_strides(x),
        *((0, 0) if residual is None else row_strides(residual)),
        *row_strides(out),
        rows,
        inner,
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
