"""append_kv: spec, tuning and binding of ``fi/kernels/append_kv.cuh``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from fi_core.records import KV_FORMATS, Batch, KVCache
from fi_core.remembered import Remembered
from fi_core.rope import RopeTable
from torch import Tensor

from ..launch import LaunchableKernel
from ..params import ParamsLayout
from ..spec import KernelSpec, kernel_for
from .rope import PAIRS
from .rows import vector_bytes

ADDRESSING = {"dense": 0, "indptr": 1, "ragged": 2, "slots": 3}
_TEAMS = (32, 64, 128, 256, 512)
_FEW_TOKENS = 1024


@dataclass(frozen=True)
class AppendKVSpec(KernelSpec):
    """One cache form and head shape.

    ``count``: elements a pack; ``rotary_dim`` 0: no RoPE; ``angle_bytes``: a load's from the table, 0: computed;
    ``*_rounds``: heads that a thread takes after each other (``q_rounds`` 0: no q). More heads than a row of blocks serves
    take more rows. ``whole``: bits 0 to 2 for q, K and V: the rows of blocks serve just the heads there are, and all threads
    have work in each round; ``packed``: the stride of heads is their dim everywhere; ``scales_per_head``: FP8 scales of K or V
    differ; ``streaming``: cached lines are the first that leave L2; ``values_first``: V is loaded and stored before K, and its
    packs come in pairs."""

    dtype: torch.dtype
    stored: torch.dtype
    head_dim: int
    head_dim_vo: int
    page_size: int
    addressing: int
    count: int
    rotary_dim: int
    pairs: int
    angle_bytes: int
    threads_per_token: int
    tokens_per_block: int
    q_rounds: int
    k_rounds: int
    v_rounds: int
    whole: int
    packed: bool
    scales_per_head: bool
    streaming: bool
    values_first: bool

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
        return self.tokens_per_block * self.threads_per_token

    @property
    def blocks_per_multiprocessor(self) -> int | None:
        """1024 threads, so 64 registers each, for threads that hold little beside a table's angles: left alone, the compiler
        settles for fewer registers and has threads wait longer. Angles that are computed need more. Likewise 1152 where many
        tokens become FP8 without RoPE."""
        holds_little = self.angle_bytes > 0 and max(self.q_rounds, self.k_rounds, self.v_rounds) <= 1
        if self.values_first or holds_little:
            return 1024 // self.num_threads
        becomes_fp8 = self.stored.itemsize == 1 and self.rotary_dim == 0 and self.tokens_per_block > 1
        return 1152 // self.num_threads if becomes_fp8 and not self.scales_per_head else None

    def served(self) -> tuple[int, int, int]:
        """Heads of q, K and V that a row of blocks serves."""
        qk_units = num_units(self.head_dim, self.rotary_dim, self.count)
        paired = self.head_dim_vo if self.values_first else 0
        units = (qk_units, qk_units, num_units(self.head_dim_vo, paired, self.count))
        rounds = (self.q_rounds, self.k_rounds, self.v_rounds)
        q, k, v = (self.threads_per_token // size * turns for size, turns in zip(units, rounds, strict=True))
        return q, k, v

    def num_slices(self, num_q_heads: int, num_kv_heads: int) -> int:
        """Rows of blocks that together serve all heads."""
        heads = (num_q_heads, num_kv_heads, num_kv_heads)
        return max(-(-count // served) for count, served in zip(heads, self.served(), strict=True) if served)


def num_units(dim: int, rotary_dim: int, count: int) -> int:
    """Threads that share a head: one for each pack of pairs, and one for each pack behind the rotated dims."""
    return rotary_dim // 2 // count + (dim - rotary_dim) // count


class AppendShape(NamedTuple):
    """What a spec is chosen by. ``kv_format`` and ``pairs`` ("none" without RoPE) as in the request, ``num_q_heads`` 0
    without q, ``vector`` the bytes to which the elements of k, v and q are aligned, ``stored_vector`` the cache's,
    ``angle_vector`` those to which the halves of the table's rows are,
    ``few_tokens``: too few of them to keep the device busy; the others as in the spec."""

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
    packed: bool = False
    scales_per_head: bool = False

    @property
    def values_first(self) -> bool:
        """Of many tokens whose K alone rotates and becomes FP8: its angles are what a thread waits for longest."""
        to_fp8 = KV_FORMATS[self.kv_format].itemsize == 1
        return to_fp8 and self.rotary_dim > 0 and self.num_q_heads == 0 and not self.few_tokens


class AppendTuning(NamedTuple):
    """How threads share the work.

    A token gets the fewest threads that hold at most ``held_packs`` packs each (``held_packs_with_rope`` with RoPE), and a
    block as many tokens as ``block_threads`` are enough for. Few tokens get the fewest threads, but at most ``few_threads``,
    that serve all heads at once, and a thread takes at most ``few_rounds`` heads of a tensor: the shortest way through the
    kernel; heads beyond that are other blocks'."""

    held_packs: int = 8
    held_packs_with_rope: int = 12
    block_threads: int = 128
    few_threads: int = 256
    few_rounds: int = 1


TUNING = AppendTuning()


class _Team(NamedTuple):
    """The threads of a token."""

    threads: int
    rounds: tuple[int, int, int]


def _rounds(shape: AppendShape, units: tuple[int, int, int], threads: int) -> tuple[int, int, int]:
    """Heads of q, K and V that each of so many threads takes, if they take all; ``units`` threads share a head."""
    heads = (shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads)
    q, k, v = (-(-count // (threads // size)) for count, size in zip(heads, units, strict=True))
    return q, k, v


def _team_of(shape: AppendShape, units: tuple[int, int, int], v_packs: int, tuning: AppendTuning) -> _Team:
    """The threads of a token as ``tuning`` says; two rounds of the most there can be where those are not enough. A thread
    holds ``v_packs`` packs of each head of V that it takes."""
    teams = [threads for threads in _TEAMS if threads >= max(units)]
    limit = tuning.held_packs_with_rope if shape.rotary_dim else tuning.held_packs
    num_packs = 2 if shape.rotary_dim else 1
    for threads in teams:
        q, k, v = rounds = _rounds(shape, units, threads)
        if shape.few_tokens:
            if max(rounds) <= 1 or threads >= tuning.few_threads:
                q, k, v = (min(turns, tuning.few_rounds) for turns in rounds)
                return _Team(threads, (q, k, v))
        elif num_packs * (q + k) + v_packs * v <= limit:
            return _Team(threads, rounds)
    q, k, v = (min(turns, 2) for turns in rounds)
    return _Team(teams[-1], (q, k, v))


@lru_cache(maxsize=1024)
def spec_for(shape: AppendShape, tuning: AppendTuning = TUNING) -> AppendKVSpec:
    """The spec of a shape: the widest pack, and threads as ``tuning`` says."""
    stored = KV_FORMATS[shape.kv_format]
    count = min(shape.vector // shape.dtype.itemsize, shape.stored_vector // stored.itemsize)
    qk_units = num_units(shape.head_dim, shape.rotary_dim, count)
    values_first = shape.values_first and shape.head_dim_vo % (2 * count) == 0
    v_units = num_units(shape.head_dim_vo, shape.head_dim_vo if values_first else 0, count)
    units = (qk_units, qk_units, v_units)
    team = _team_of(shape, units, 2 if values_first else 1, tuning)
    spec = AppendKVSpec(
        shape.dtype,
        stored,
        shape.head_dim,
        shape.head_dim_vo,
        shape.page_size,
        ADDRESSING[shape.addressing],
        count,
        shape.rotary_dim,
        PAIRS.get(shape.pairs, 0),
        min(shape.angle_vector, 4 * (count & -count)) if shape.table else 0,
        team.threads,
        1 if shape.few_tokens else max(1, tuning.block_threads // team.threads),
        *team.rounds,
        0,
        shape.packed,
        shape.scales_per_head,
        # Stores of 16 bytes fill lines quickly; those of FP8 are half as wide, and lose what streaming gains.
        not shape.few_tokens and stored.itemsize == 2 and count * stored.itemsize == 16,
        values_first,
    )
    heads = (shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads)
    whole, slices = 0, spec.num_slices(shape.num_q_heads, shape.num_kv_heads)
    for bit, (num_heads, served, size) in enumerate(zip(heads, spec.served(), units, strict=True)):
        # q is rotated in place, so that its other dims are no work.
        all_work = bit > 0 or shape.rotary_dim == shape.head_dim
        whole |= (num_heads > 0 and num_heads == served * slices and team.threads % size == 0 and all_work) << bit
    return replace(spec, whole=whole)


class _CacheForm(NamedTuple):
    """What launches take of a cache besides addresses: ``stride_bits`` are the bits that occur in strides of K and V in
    bytes, ``strides`` the struct's values in its order, ``scale_values`` those of scales that are no tensors."""

    page_size: int
    stride_bits: int
    packed: bool
    scales_per_head: bool
    strides: tuple[int, ...]
    scale_strides: tuple[int, int]
    scale_values: tuple[float, float]


_forms: Remembered[_CacheForm] = Remembered()


def _form_of(kv: KVCache) -> _CacheForm:
    """The form of ``kv``, remembered: records are frozen."""
    found = _forms.get(kv)
    if found is None:
        *k_strides, k_head = _cache_strides(kv, kv.k)
        *v_strides, v_head = _cache_strides(kv, kv.v)
        stride_bits = 0
        for stride in (*kv.k.stride()[:-1], *kv.v.stride()[:-1]):
            stride_bits |= stride * kv.k.element_size()
        packed = k_head == kv.k.shape[-1] and v_head == kv.v.shape[-1]
        (k_stride, k_value), (v_stride, v_value) = _scale(kv.k_scale), _scale(kv.v_scale)
        strides = (*k_strides, *v_strides, k_head, v_head)
        per_head = k_stride + v_stride > 0
        scales = ((k_stride, v_stride), (k_value, v_value))
        found = _CacheForm(kv.page_size or 0, stride_bits, packed, per_head, strides, *scales)
        _forms.put(kv, found)
    return found


def _scale(scale: float | Tensor | None) -> tuple[int, float]:
    """(stride, value) of a cache's scale; that of a tensor is read on the device."""
    if isinstance(scale, Tensor):
        return int(scale.numel() > 1), 1.0
    return 0, 1.0 if scale is None else scale


def _cache_strides(kv: KVCache, tensor: Tensor) -> tuple[int, int, int]:
    """(page, token, head) strides; a ragged cache is one page."""
    page = tensor.stride(0) if kv.is_paged else 0
    first, second = tensor.stride(-3), tensor.stride(-2)
    return (page, first, second) if kv.layout == "NHD" else (page, second, first)


def _shape(k: Tensor, v: Tensor, kv: KVCache, batch: Batch, rope: RopeTable | None, q: Tensor | None) -> AppendShape:
    form = _form_of(kv)
    num_tokens, num_kv_heads, head_dim = k.shape
    head_dim_vo, size = v.shape[2], k.element_size()
    rotary_dim = 0 if rope is None else rope.config.rotary_dim
    # Both halves of a pair, the dims behind them and all of V must start on a whole vector.
    together = head_dim | head_dim_vo | rotary_dim // 2 | (head_dim - rotary_dim)
    (k_row, k_head, _), (v_row, v_head, _) = k.stride(), v.stride()
    bits = 16 | (together | k_row | k_head | v_row | v_head) * size | k.data_ptr() | v.data_ptr()
    packed = form.packed and k_head == head_dim and v_head == head_dim_vo
    num_q_heads = 0
    if q is not None:
        num_q_heads, (q_row, q_head, _) = q.shape[1], q.stride()
        bits |= (q_row | q_head) * size | q.data_ptr()
        packed = packed and q_head == head_dim
    stored_bits = 16 | together * kv.k.element_size() | form.stride_bits | kv.k.data_ptr() | kv.v.data_ptr()
    table = None if rope is None else rope.cos_sin
    return AppendShape(
        k.dtype,
        kv.format or "",
        head_dim,
        head_dim_vo,
        form.page_size,
        batch.table_form if batch.slot_mapping is None else "slots",
        rotary_dim,
        "none" if rope is None else rope.config.pairs,
        table is not None,
        num_q_heads,
        num_kv_heads,
        bits & -bits,
        stored_bits & -stored_bits,
        16 if table is None else vector_bytes(table, multiple_of=rotary_dim // 2),
        num_tokens <= _FEW_TOKENS,
        packed,
        form.scales_per_head,
    )


@lru_cache(maxsize=1024)
def _bound(device: torch.device, shape: AppendShape) -> tuple[LaunchableKernel, int, int]:
    """The kernel of a shape, its tokens a block and its rows of blocks."""
    spec = spec_for(shape)
    return kernel_for(spec, device), spec.tokens_per_block, spec.num_slices(shape.num_q_heads, shape.num_kv_heads)


def _address(value: float | Tensor | None) -> int:
    return value.data_ptr() if isinstance(value, Tensor) else 0


def append_kv(k: Tensor, v: Tensor, kv: KVCache, batch: Batch, rope: RopeTable | None, q: Tensor | None) -> None:
    """The ``AppendKV`` protocol of fi-core: K, V and q in one launch."""
    num_tokens, num_kv_heads, _ = k.shape
    num_requests, num_q_heads = batch.size, 0 if q is None else q.shape[1]
    if num_tokens == 0 or num_requests == 0 or num_kv_heads + num_q_heads == 0:
        return
    device, form = k.device, _form_of(kv)
    kernel, tokens_per_block, num_slices = _bound(device, _shape(k, v, kv, batch, rope, q))
    table, indptr = batch.table, batch.kv_indptr if batch.table is None else batch.table_indptr
    angles = None if rope is None else rope.inv_freq if rope.cos_sin is None else rope.cos_sin
    kernel.launch(
        device,
        -(-num_tokens // tokens_per_block),
        num_slices,
        k.data_ptr(),
        v.data_ptr(),
        _address(kv.k_scale),
        _address(kv.v_scale),
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
        *form.strides,
        table.stride(0) if table is not None and indptr is None else 0,
        0 if angles is None else angles.stride(0),
        num_tokens,
        num_requests,
        num_q_heads,
        num_kv_heads,
        *form.scale_strides,
        *form.scale_values,
        1.0 if rope is None else rope.config.attention_factor,
    )
