"""silu_mul and gelu_mul: spec and binding of ``fi/kernels/gated_activation.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..launch import LaunchableKernel
from ..params import ParamsLayout
from ..spec import KernelSpec, kernel_for
from .rows import inner_size, num_rows, row_strides, vector_bytes

SILU, GELU, GELU_TANH = 0, 1, 2


@dataclass(frozen=True)
class GatedActivationSpec(KernelSpec):
    """One output width, element type and activation (the header's enum)."""

    dtype: torch.dtype
    width: int
    vector_bytes: int
    activation: int

    stem: ClassVar = "gated_activation"
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (
            ("x", "pointer"),
            ("out", "output"),
            ("x_strides", "rows"),
            ("out_strides", "rows"),
            ("inner_size", "int32"),
        )
    )

    @property
    def num_packs(self) -> int:
        """Vectors of an output row."""
        return self.width * self.dtype.itemsize // self.vector_bytes

    @property
    def num_threads(self) -> int:
        """A block takes a piece of one row."""
        return min(128, (self.num_packs + 31) // 32 * 32)

    @property
    def blocks_per_row(self) -> int:
        return (self.num_packs + self.num_threads - 1) // self.num_threads


@lru_cache(maxsize=1024)
def _bound(
    device: torch.device, dtype: torch.dtype, width: int, vector: int, activation: int
) -> tuple[LaunchableKernel, int]:
    """The kernel, and its blocks a row."""
    spec = GatedActivationSpec(dtype, width, vector, activation)
    return kernel_for(spec, device), spec.blocks_per_row


def _launch(x: Tensor, activation: int, out: Tensor) -> None:
    rows, width, device = num_rows(out), out.shape[-1], x.device
    kernel, blocks_per_row = _bound(device, x.dtype, width, vector_bytes(x, out, multiple_of=width), activation)
    kernel.launch(
        device,
        rows * blocks_per_row,
        1,
        x.data_ptr(),
        out.data_ptr(),
        *row_strides(x),
        *row_strides(out),
        inner_size(x),
    )


def silu_mul(x: Tensor, approximate: str, out: Tensor) -> None:
    """The ``GatedActivation`` protocol of fi-core with SiLU; ``approximate`` is "none"."""
    _launch(x, SILU, out)


def gelu_mul(x: Tensor, approximate: str, out: Tensor) -> None:
    """The ``GatedActivation`` protocol of fi-core with GELU: "none" (erf) or "tanh"."""
    _launch(x, GELU if approximate == "none" else GELU_TANH, out)
