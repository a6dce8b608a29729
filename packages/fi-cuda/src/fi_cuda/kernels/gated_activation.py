"""silu_mul and gelu_mul: spec and binding of ``fi/kernels/gated_activation.cuh``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..params import ParamsLayout
from ..spec import KernelSpec, kernel_for
from .rows import LaunchForm, aligned_bytes, inner_size, row_strides

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


@lru_cache(maxsize=4096)
def _form(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], tuple[int, ...]],
    address: int,
    activation: int,
) -> LaunchForm:
    """``shape`` of the output, ``strides`` of both tensors, ``address``: the bits below 16 of both addresses."""
    width, (x, out) = shape[-1], strides
    spec = GatedActivationSpec(dtype, width, aligned_bytes(address, strides, width, dtype.itemsize), activation)
    num_blocks = math.prod(shape[:-1]) * spec.blocks_per_row
    return LaunchForm(kernel_for(spec, device), num_blocks, (*row_strides(x), *row_strides(out), inner_size(shape)))


def _launch(x: Tensor, activation: int, out: Tensor) -> None:
    device, x_address, out_address = x.device, x.data_ptr(), out.data_ptr()
    strides = (x.stride(), out.stride())
    form = _form(device, x.dtype, out.shape, strides, (x_address | out_address) & 15, activation)
    form.kernel.launch(device, form.num_blocks, 1, x_address, out_address, *form.sizes)


def silu_mul(x: Tensor, approximate: str, out: Tensor) -> None:
    """The ``GatedActivation`` protocol of fi-core with SiLU; ``approximate`` is "none"."""
    _launch(x, SILU, out)


def gelu_mul(x: Tensor, approximate: str, out: Tensor) -> None:
    """The ``GatedActivation`` protocol of fi-core with GELU: "none" (erf) or "tanh"."""
    _launch(x, GELU if approximate == "none" else GELU_TANH, out)
