"""append_kv: spec, tuning and binding of ``fi/kernels/append_kv.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from fi_core.records import KV_FORMATS, Batch, KVCache
from fi_core.rope import RopeTable
from torch import Tensor

from ..params import ParamsLayout
from ..spec import KernelSpec, kernel_for
from .rope import PAIRS
from .rows import vector_bytes

ADDRESSING = {"dense": 0, "indptr": 1, "ragged": 2, "slots": 3}
_TEAMS = (32, 64, 128, 256, 512)
_HELD_PACKS = 4
_HELD_PACKS_WITH_ROPE = 7
_FEW_TOKENS = 1024
_SMALLEST_BLOCK = 64


@dataclass(frozen=True)
class AppendKVSpec(KernelSpec):
    """One cache form and head shape. ``count``: elements a pack; ``rotary_dim`` 0: no RoPE; ``angle_bytes``: a
    load's from the table; ``q_rounds`` 0: no q; a block row serves ``lanes * rounds`` heads of each tensor, more heads take
    more rows of blocks."""

    dtype: torch.dtype
    stored: torch.dtype
    head_dim: int
    head_dim_vo: int
    page_size: int
    addressing: int
    count: int
    rotary_dim: int
    pairs: int
    table: bool
    angle_bytes: int
    threads_per_token: int
    q_rounds: int
    k_rounds: int
    v_rounds: int

    stem: ClassVar = "append_kv"
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (
            ("k", "pointer"),
            ("v", "pointer"),
            ("k_scales", "pointer"),
            ("v_scales", "pointer"),
            ("q_indptr", "pointer"),
            ("kv_lens", "pointer"),
            ("table", "pointer"),
            ("table_row", "pointer"),
            ("indptr", "pointer"),
            ("slots", "pointer"),
            ("rope", "pointer"),
            ("q", "output"),
            ("k_cache", "output"),
            ("v_cache", "output"),
            ("k_strides", "rows"),
            ("v_strides", "rows"),
            ("q_strides", "rows"),
            ("k_cache_strides", "rows"),
            ("v_cache_strides", "rows"),
            ("k_head_stride", "int64"),
            ("v_head_stride", "int64"),
            ("table_stride", "int64"),
            ("rope_stride", "int64"),
            ("num_tokens", "int64"),
            ("num_requests", "int32"),
            ("num_q_heads", "int32"),
            ("num_kv_heads", "int32"),
            ("k_scale_stride", "int32"),
            ("v_scale_stride", "int32"),
            ("k_scale", "float"),
            ("v_scale", "float"),
            ("factor", "float"),
        )
    )

    @property
    def num_threads(self) -> int:
        return max(_SMALLEST_BLOCK, self.threads_per_token)

    @property
    def tokens_per_block(self) -> int:
        return self.num_threads // self.threads_per_token

    def num_slices(self, num_q_heads: int, num_kv_heads: int) -> int:
        """Rows of blocks that together serve all heads."""
        k_lanes = self.threads_per_token // num_units(self.head_dim, self.rotary_dim, self.count)
        v_lanes = self.threads_per_token // num_units(self.head_dim_vo, 0, self.count)
        parts = [(num_kv_heads, k_lanes * self.k_rounds), (num_kv_heads, v_lanes * self.v_rounds)]
        if self.q_rounds:
            parts.append((num_q_heads, k_lanes * self.q_rounds))
        return max(-(-heads // served) for heads, served in parts)


def num_units(dim: int, rotary_dim: int, count: int) -> int:
    """Threads that share a head: one for each pack of pairs, and one for each pack behind the rotated dims."""
    return rotary_dim // 2 // count + (dim - rotary_dim) // count


class AppendShape(NamedTuple):
    """What a spec is chosen by. ``kv_format`` and ``pairs`` ("none" without RoPE) as in the request, ``num_q_heads`` 0
    without q, ``vector`` the bytes to which the elements of k, v and q are aligned, ``stored_vector`` the cache's,
    ``angle_vector`` those to which the halves of the table's rows are,
    ``few_tokens``: too few of them to keep the device busy."""

    dtype: torch.dtype
    kv_format: str
    head_dim: int
    head_dim_vo: int
    page_size: int
    addressing: str
    rotary_dim: int
    pairs: str
    table: bool
    num_q_heads: int
    num_kv_heads: int
    vector: int
    stored_vector: int
    angle_vector: int = 16
    few_tokens: bool = False


@lru_cache(maxsize=1024)
def spec_for(shape: AppendShape) -> AppendKVSpec:
    """The spec of a shape: the widest pack, and the fewest threads a token whose packs fit into a few registers each; for few
    tokens without q enough threads that each has one head of each tensor, the shortest way through the kernel."""
    stored = KV_FORMATS[shape.kv_format]
    count = min(shape.vector // shape.dtype.itemsize, shape.stored_vector // stored.itemsize)
    qk_units = num_units(shape.head_dim, shape.rotary_dim, count)
    v_units = num_units(shape.head_dim_vo, 0, count)
    num_packs = 2 if shape.rotary_dim else 1
    limit = _HELD_PACKS_WITH_ROPE if shape.rotary_dim else _HELD_PACKS
    alone = shape.few_tokens and not shape.num_q_heads
    if alone:
        limit = num_packs + 1
    for threads in _TEAMS:
        if threads < max(qk_units, v_units):
            continue
        q_rounds, k_rounds = (-(-heads // (threads // qk_units)) for heads in (shape.num_q_heads, shape.num_kv_heads))
        v_rounds = -(-shape.num_kv_heads // (threads // v_units))
        held = num_packs * (q_rounds + k_rounds) + v_rounds
        if held <= limit:
            break
    most_rounds = 1 if alone else 2
    rounds = [
        min(rounds, most_rounds) if threads == _TEAMS[-1] else rounds for rounds in (q_rounds, k_rounds, v_rounds)
    ]
    return AppendKVSpec(
        shape.dtype,
        stored,
        shape.head_dim,
        shape.head_dim_vo,
        shape.page_size,
        ADDRESSING[shape.addressing],
        count,
        shape.rotary_dim,
        PAIRS.get(shape.pairs, 0),
        shape.table,
        min(shape.angle_vector, 4 * (count & -count)) if shape.table else 4,
        threads,
        *rounds,
    )


def _shape(k: Tensor, v: Tensor, kv: KVCache, batch: Batch, rope: RopeTable | None, q: Tensor | None) -> AppendShape:
    head_dim, head_dim_vo = k.shape[2], v.shape[2]
    rotary_dim = 0 if rope is None else rope.config.rotary_dim
    # Both halves of a pair, the dims behind them and all of V must start on a whole vector.
    together = head_dim | head_dim_vo | rotary_dim // 2 | (head_dim - rotary_dim)
    inputs = (k, v) if q is None else (k, v, q)
    return AppendShape(
        k.dtype,
        kv.format or "",
        head_dim,
        head_dim_vo,
        kv.page_size or 0,
        batch.table_form if batch.slot_mapping is None else "slots",
        rotary_dim,
        "none" if rope is None else rope.config.pairs,
        rope is not None and rope.cos_sin is not None,
        0 if q is None else q.shape[1],
        k.shape[1],
        vector_bytes(*inputs, multiple_of=together),
        vector_bytes(kv.k, kv.v, multiple_of=together),
        16 if rope is None or rope.cos_sin is None else vector_bytes(rope.cos_sin, multiple_of=rotary_dim // 2),
        k.shape[0] <= _FEW_TOKENS,
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _scale(scale: float | Tensor | None) -> tuple[int, int, float]:
    """(address, stride, value) of a cache's scale."""
    if isinstance(scale, Tensor):
        return scale.data_ptr(), int(scale.numel() > 1), 1.0
    return 0, 0, 1.0 if scale is None else scale


def _cache_strides(kv: KVCache, tensor: Tensor) -> tuple[int, int, int]:
    """(page, token, head) strides; a ragged cache is one page."""
    page = tensor.stride(0) if kv.is_paged else 0
    first, second = tensor.stride(-3), tensor.stride(-2)
    return (page, first, second) if kv.layout == "NHD" else (page, second, first)


def append_kv(k: Tensor, v: Tensor, kv: KVCache, batch: Batch, rope: RopeTable | None, q: Tensor | None) -> None:
    """The ``AppendKV`` protocol of fi-core: K, V and q in one launch."""
    num_tokens, num_kv_heads, _ = k.shape
    num_q_heads = 0 if q is None else q.shape[1]
    if num_tokens == 0 or batch.size == 0 or num_kv_heads + num_q_heads == 0:
        return
    spec = spec_for(_shape(k, v, kv, batch, rope, q))
    table, indptr = batch.table, batch.kv_indptr if batch.table is None else batch.table_indptr
    angles = None if rope is None else rope.inv_freq if rope.cos_sin is None else rope.cos_sin
    k_scales, k_scale_stride, k_scale = _scale(kv.k_scale)
    v_scales, v_scale_stride, v_scale = _scale(kv.v_scale)
    *k_cache_strides, k_head_stride = _cache_strides(kv, kv.k)
    *v_cache_strides, v_head_stride = _cache_strides(kv, kv.v)
    kernel_for(spec, k.device).launch(
        k.device,
        -(-num_tokens // spec.tokens_per_block),
        spec.num_slices(num_q_heads, num_kv_heads),
        k.data_ptr(),
        v.data_ptr(),
        k_scales,
        v_scales,
        batch.q_indptr.data_ptr(),
        batch.kv_lens.data_ptr(),
        _address(table),
        _address(batch.table_row),
        _address(indptr),
        _address(batch.slot_mapping),
        _address(angles),
        _address(q),
        kv.k.data_ptr(),
        kv.v.data_ptr(),
        *k.stride()[:2],
        *v.stride()[:2],
        *((0, 0) if q is None else q.stride()[:2]),
        *k_cache_strides,
        *v_cache_strides,
        k_head_stride,
        v_head_stride,
        table.stride(0) if table is not None and table.dim() == 2 else 0,
        0 if angles is None else angles.stride(0),
        num_tokens,
        batch.size,
        num_q_heads,
        num_kv_heads,
        k_scale_stride,
        v_scale_stride,
        k_scale,
        v_scale,
        1.0 if rope is None else rope.config.attention_factor,
    )
