"""RoPE: spec, tuning and binding of ``fi/kernels/rope.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from fi_core.rope import RopeTable
from torch import Tensor

from ..launch import LaunchableKernel
from ..params import ParamsLayout
from ..spec import KernelSpec, kernel_for
from .rows import vector_bytes

PAIRS = {"half": 1, "interleaved": 2}
_THREADS = 256
_LANES, _FEW_TOKEN_LANES = 16, 32
_FEW_TOKENS = 1024
_HELD_HEADS = 2


@dataclass(frozen=True)
class RopeSpec(KernelSpec):
    """One head shape and element type; ``angle_bytes``: a load's from the table, 0: computed. ``head_lanes`` heads of a token are
    in work at once; each thread's first ``held_heads`` of q are loaded before the angles."""

    dtype: torch.dtype
    position_type: torch.dtype
    head_dim: int
    rotary_dim: int
    vector_bytes: int
    pairs: int
    angle_bytes: int
    head_lanes: int
    held_heads: int

    stem: ClassVar = "rope"
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (
            ("q", "pointer"),
            ("k", "pointer"),
            ("positions", "pointer"),
            ("table", "pointer"),
            ("q_out", "output"),
            ("k_out", "output"),
            ("q_strides", "rows"),
            ("k_strides", "rows"),
            ("q_out_strides", "rows"),
            ("k_out_strides", "rows"),
            ("num_tokens", "int64"),
            ("table_stride", "int64"),
            ("num_q_heads", "int32"),
            ("num_k_heads", "int32"),
            ("factor", "float"),
        )
    )

    @property
    def num_units(self) -> int:
        """Threads that share a head: one for each pack of pairs, and one for each pack behind the rotated dims."""
        count = self.vector_bytes // self.dtype.itemsize
        return self.rotary_dim // 2 // count + (self.head_dim - self.rotary_dim) // count

    @property
    def tokens_per_block(self) -> int:
        return max(1, _THREADS // (self.num_units * self.head_lanes))

    @property
    def num_threads(self) -> int:
        threads = self.num_units * self.head_lanes * self.tokens_per_block
        return (threads + 31) // 32 * 32

    def config_lines(self) -> list[str]:
        return [
            *super().config_lines(),
            f"static constexpr int kTokensPerBlock = {self.tokens_per_block};",
        ]


def spec_for(
    dtype: torch.dtype,
    position_type: torch.dtype,
    dims: tuple[int, int, int],
    pairs: str,
    table_vector: int,
    few_tokens: bool,
) -> RopeSpec:
    """The spec for ``dims`` = (head_dim, rotary_dim, vector_bytes) and a table whose halves of rows are aligned to
    ``table_vector`` bytes (0: no table). Few tokens get a block each; with many, a thread keeps its angles for more heads."""
    head_dim, rotary_dim, vector = dims
    num_units = (head_dim - rotary_dim // 2) * dtype.itemsize // vector
    head_lanes = max(1, min(_FEW_TOKEN_LANES if few_tokens else _LANES, _THREADS // num_units))
    count = vector // dtype.itemsize
    angle_bytes = min(table_vector, 4 * (count & -count))
    return RopeSpec(
        dtype, position_type, *dims, PAIRS[pairs], angle_bytes, head_lanes, 1 if few_tokens else _HELD_HEADS
    )


@lru_cache(maxsize=1024)
def _bound(device: torch.device, *choices: Any) -> tuple[LaunchableKernel, int]:
    """The kernel for the arguments of ``spec_for``, and its tokens a block."""
    spec = spec_for(*choices)
    return kernel_for(spec, device), spec.tokens_per_block


def rope(q: Tensor, k: Tensor | None, positions: Tensor, table: RopeTable, q_out: Tensor, k_out: Tensor | None) -> None:
    """The ``Rope`` protocol of fi-core: float32 arithmetic, rounded once."""
    num_tokens, num_heads, head_dim = q.shape
    rotary_dim = table.config.rotary_dim
    others = () if k is None or k_out is None else (k, k_out)
    # Both halves of a pair, and the dims behind them, must start on a whole vector.
    together = rotary_dim // 2 if head_dim == rotary_dim else (rotary_dim // 2) | (head_dim - rotary_dim)
    vector = vector_bytes(q, q_out, *others, multiple_of=together)
    source = table.inv_freq if table.cos_sin is None else table.cos_sin
    device, dims = q.device, (head_dim, rotary_dim, vector)
    table_vector = 0 if table.cos_sin is None else vector_bytes(table.cos_sin, multiple_of=rotary_dim // 2)
    few = num_tokens <= _FEW_TOKENS
    kernel, tokens_per_block = _bound(device, q.dtype, positions.dtype, dims, table.config.pairs, table_vector, few)
    kernel.launch(
        device,
        (num_tokens + tokens_per_block - 1) // tokens_per_block,
        1,
        q.data_ptr(),
        0 if k is None else k.data_ptr(),
        positions.data_ptr(),
        source.data_ptr(),
        q_out.data_ptr(),
        0 if k_out is None else k_out.data_ptr(),
        *q.stride()[:2],
        *((0, 0) if k is None else k.stride()[:2]),
        *q_out.stride()[:2],
        *((0, 0) if k_out is None else k_out.stride()[:2]),
        num_tokens,
        source.stride(0),
        num_heads,
        0 if k is None else k.shape[1],
        table.config.attention_factor,
    )
