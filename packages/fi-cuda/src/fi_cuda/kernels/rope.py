"""RoPE: spec, tuning and binding of ``fi/kernels/rope.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from fi_core.remembered import Remembered
from fi_core.rope import RopeTable
from torch import Tensor

from ..params import ParamsLayout
from ..spec import KernelSpec, kernel_for
from .rows import LaunchForm, aligned_bytes, vector_bytes

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


class _Rotation(NamedTuple):
    """What a form takes of a table: its halves of rows are aligned to ``table_vector`` bytes (0: no table), its rows are
    ``stride`` elements apart."""

    rotary_dim: int
    pairs: str
    table_vector: int
    stride: int


@lru_cache(maxsize=4096)
def _form(
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    shapes: tuple[tuple[int, ...], int],
    strides: tuple[tuple[int, ...], ...],
    address: int,
    rotation: _Rotation,
) -> LaunchForm:
    """``dtypes`` of q and the positions; ``shapes``: q's, and k's heads; ``strides`` of q, q_out, k and k_out, those of k
    left out without it; ``address``: the bits below 16 of all their addresses."""
    (dtype, position_type), ((num_tokens, num_heads, head_dim), num_others) = dtypes, shapes
    rotary_dim = rotation.rotary_dim
    # Both halves of a pair, and the dims behind them, must start on a whole vector.
    together = rotary_dim // 2 if head_dim == rotary_dim else (rotary_dim // 2) | (head_dim - rotary_dim)
    dims = (head_dim, rotary_dim, aligned_bytes(address, strides, together, dtype.itemsize))
    few = num_tokens <= _FEW_TOKENS
    spec = spec_for(dtype, position_type, dims, rotation.pairs, rotation.table_vector, few)
    q, q_out, k, k_out = (*strides, (0, 0), (0, 0))[:4]
    rows = (*q[:2], *k[:2], *q_out[:2], *k_out[:2])
    num_blocks = -(-num_tokens // spec.tokens_per_block)
    return LaunchForm(kernel_for(spec, device), num_blocks, (*rows, num_tokens, rotation.stride, num_heads, num_others))


_rotations: Remembered[_Rotation] = Remembered()


def _rotation_of(table: RopeTable) -> _Rotation:
    found = _rotations.get(table)
    if found is None:
        config, angles = table.config, table.cos_sin
        vector = 0 if angles is None else vector_bytes(angles, multiple_of=config.rotary_dim // 2)
        found = _Rotation(
            config.rotary_dim, config.pairs, vector, (table.inv_freq if angles is None else angles).stride(0)
        )
        _rotations.put(table, found)
    return found


def rope(q: Tensor, k: Tensor | None, positions: Tensor, table: RopeTable, q_out: Tensor, k_out: Tensor | None) -> None:
    """The ``Rope`` protocol of fi-core: float32 arithmetic, rounded once."""
    device, source = q.device, table.inv_freq if table.cos_sin is None else table.cos_sin
    q_address, q_out_address, k_address, k_out_address = q.data_ptr(), q_out.data_ptr(), 0, 0
    strides: tuple[tuple[int, ...], ...] = (q.stride(), q_out.stride())
    num_others = 0
    if k is not None and k_out is not None:
        k_address, k_out_address, num_others = k.data_ptr(), k_out.data_ptr(), k.shape[1]
        strides = (*strides, k.stride(), k_out.stride())
    address = (q_address | q_out_address | k_address | k_out_address) & 15
    form = _form(device, (q.dtype, positions.dtype), (q.shape, num_others), strides, address, _rotation_of(table))
    form.kernel.launch(
        device,
        form.num_blocks,
        1,
        q_address,
        k_address,
        positions.data_ptr(),
        source.data_ptr(),
        q_out_address,
        k_out_address,
        *form.sizes,
        table.config.attention_factor,
    )
