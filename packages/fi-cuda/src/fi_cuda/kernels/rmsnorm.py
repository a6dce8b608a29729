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


@dataclass(frozen=True)
class RmsNormSpec(KernelSpec):
    """One row width and element type; ``add`` fuses the residual add."""

    dtype: torch.dtype
    width: int
    vector_bytes: int
    add: bool

    stem: ClassVar = "rmsnorm"
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (
            ("x", "pointer"),
            ("weight", "pointer"),
            ("residual", "output"),
            ("out", "output"),
            ("x_strides", "rows"),
            ("residual_strides", "rows"),
            ("out_strides", "rows"),
            ("num_rows", "int64"),
            ("inner_size", "int32"),
            ("eps", "float"),
            ("weight_bias", "float"),
        )
    )

    @property
    def threads_per_row(self) -> int:
        """Two packs a thread where a row has enough of them; short rows finish in one round."""
        num_packs = self.width * self.dtype.itemsize // self.vector_bytes
        return min(512, power_of_2_at_least((num_packs + 1) // 2 if num_packs > 32 else num_packs))

    @property
    def num_threads(self) -> int:
        return max(128, self.threads_per_row)

    def config_lines(self) -> list[str]:
        return [*super().config_lines(), f"static constexpr int kThreadsPerRow = {self.threads_per_row};"]


@lru_cache(maxsize=1024)
def _bound(
    device: torch.device, dtype: torch.dtype, width: int, vector: int, add: bool
) -> tuple[LaunchableKernel, int]:
    """The kernel, and its rows a block."""
    spec = RmsNormSpec(dtype, width, vector, add)
    return kernel_for(spec, device), spec.num_threads // spec.threads_per_row


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_bias: float, out: Tensor) -> None:
    rows, width = num_rows(x), x.shape[-1]
    tensors = (x, weight, out) if residual is None else (x, weight, out, residual)
    device, vector = x.device, vector_bytes(*tensors, multiple_of=width)
    kernel, rows_per_block = _bound(device, x.dtype, width, vector, residual is not None)
    kernel.launch(
        device,
        (rows + rows_per_block - 1) // rows_per_block,
        1,
        x.data_ptr(),
        weight.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        out.data_ptr(),
        *row_strides(x),
        *((0, 0) if residual is None else row_strides(residual)),
        *row_strides(out),
        rows,
        inner_size(x),
        eps,
        weight_bias,
    )


def rmsnorm(x: Tensor, weight: Tensor, eps: float, weight_bias: float, out: Tensor) -> None:
    """The ``RMSNorm`` protocol of fi-core, x [rows, D] or [outer, inner, D]."""
    _launch(x, None, weight, eps, weight_bias, out)


def add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_bias: float, out: Tensor) -> None:
    """The ``AddRMSNorm`` protocol of fi-core: the sum is rounded to its dtype, stored, and normalised."""
    _launch(x, residual, weight, eps, weight_bias, out)
