"""merge_states: spec and binding of ``fi/kernels/merge_states.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..launch import LaunchableKernel
from ..params import ParamsLayout
from ..spec import KernelSpec, kernel_for
from .rows import vector_bytes

_THREADS = 128


@dataclass(frozen=True)
class MergeStatesSpec(KernelSpec):
    """One head width and element type."""

    dtype: torch.dtype
    head_dim: int
    vector_bytes: int

    stem: ClassVar = "merge_states"
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (
            ("o", "pointer"),
            ("lse", "pointer"),
            ("o_out", "output"),
            ("lse_out", "output"),
            ("o_strides", "rows"),
            ("lse_strides", "rows"),
            ("o_out_strides", "rows"),
            ("lse_out_strides", "rows"),
            ("o_state_stride", "int64"),
            ("lse_state_stride", "int64"),
            ("num_rows", "int64"),
            ("num_heads", "int32"),
            ("num_states", "int32"),
        )
    )

    @property
    def num_threads(self) -> int:
        return _THREADS

    def num_blocks(self, num_rows: int) -> int:
        """Blocks for so many rows: a thread for each pack of a row."""
        num_packs = num_rows * (self.head_dim * self.dtype.itemsize // self.vector_bytes)
        return (num_packs + _THREADS - 1) // _THREADS


@lru_cache(maxsize=1024)
def _bound(
    device: torch.device, dtype: torch.dtype, head_dim: int, vector: int
) -> tuple[LaunchableKernel, MergeStatesSpec]:
    """The kernel for rows of so many elements, and its spec."""
    spec = MergeStatesSpec(dtype, head_dim, vector)
    return kernel_for(spec, device), spec


def merge_states(o: Tensor, lse: Tensor, o_out: Tensor, lse_out: Tensor) -> None:
    """The ``MergeStates`` protocol of fi-core, in float32, states in ascending order."""
    num_states, num_tokens, num_heads, head_dim = o.shape
    num_rows = num_tokens * num_heads
    device, vector = o.device, vector_bytes(o, o_out, multiple_of=head_dim)
    kernel, spec = _bound(device, o.dtype, head_dim, vector)
    o_state, *o_strides, _ = o.stride()
    lse_state, *lse_strides = lse.stride()
    kernel.launch(
        device,
        spec.num_blocks(num_rows),
        1,
        o.data_ptr(),
        lse.data_ptr(),
        o_out.data_ptr(),
        lse_out.data_ptr(),
        *o_strides,
        *lse_strides,
        *o_out.stride()[:2],
        *lse_out.stride(),
        o_state,
        lse_state,
        num_rows,
        num_heads,
        num_states,
    )
