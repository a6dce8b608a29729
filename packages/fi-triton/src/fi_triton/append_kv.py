"""Write new keys and values into the cache: K, V and the rotation of K and q in one launch.

Sources: paged caches (Kwon et al., 2023, section 4); rotary embedding (Su et al., 2021, section 3.4); FP8 formats
(Micikevicius et al., 2022, section 3).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fi_core.records import KV_FORMATS, Batch, KVCache
from fi_core.rope import RopeTable
from torch import Tensor

from .launch import on_device
from .quantise_device import quantise
from .rope_device import load_pairs, rope_cos_sin, rotate_pairs, store_pairs

RAGGED = tl.constexpr(0)
DENSE = tl.constexpr(1)
INDPTR = tl.constexpr(2)
SLOTS = tl.constexpr(3)

NO_ROPE = tl.constexpr(0)
HALF = tl.constexpr(1)
INTERLEAVED = tl.constexpr(2)

_ADDRESSING = {"ragged": 0, "dense": 1, "indptr": 2}
_PAIRS = {"half": 1, "interleaved": 2}
_ELEMENTS = 1024


@triton.jit
def request_of(token, q_indptr_ptr, num_requests):
    """The request that owns row ``token`` < q_indptr[num_requests]: the last whose rows begin at or before it."""
    low = token * 0
    high = low + num_requests
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(q_indptr_ptr + middle) <= token
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def find_slot(
    token, request, position, table_ptr, table_row_ptr, kv_indptr_ptr, slots_ptr, table_stride,
    PAGE_SIZE: tl.constexpr, ADDRESSING: tl.constexpr, TABLE_ROW: tl.constexpr,
):  # fmt: skip
    """(page, token in the page, whether there is a place) of a row; ragged caches (PAGE_SIZE 0) are one page."""
    if ADDRESSING == SLOTS:
        slot = tl.load(slots_ptr + token)
        placed = slot >= 0
    else:
        slot = position
        placed = position >= 0
    if ADDRESSING == RAGGED:
        slot += tl.load(kv_indptr_ptr + request)
    if PAGE_SIZE == 0:
        page = slot * 0
        offset = slot
    else:
        page = slot // PAGE_SIZE
        offset = slot % PAGE_SIZE
        if ADDRESSING == DENSE:
            row = request
            if TABLE_ROW:
                row = tl.load(table_row_ptr + request).to(tl.int64)
            page = tl.load(table_ptr + row * table_stride + page, mask=placed, other=0).to(tl.int64)
        if ADDRESSING == INDPTR:
            first = tl.load(kv_indptr_ptr + request)
            page = tl.load(table_ptr + first + page, mask=placed, other=0).to(tl.int64)
    return page, offset, placed


@triton.jit
def write_heads(
    source_ptr, target_ptr, scale_ptr, scale_value, scale_stride, num_heads, first_head, source_stride, target_stride,
    cos, sin, num_pairs,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    ROPE: tl.constexpr, SCALE: tl.constexpr, LIMIT: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one row: rotated (ROPE), quantised (LIMIT) and stored. ALL False: only the rotated dims (in place)."""
    head = (first_head + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    live = head < num_heads
    source = source_ptr + head * source_stride
    target = target_ptr + head * target_stride
    scale = tl.full((HEADS, 1), 1.0, tl.float32) * scale_value
    if SCALE:
        scale = tl.load(scale_ptr + head * scale_stride, mask=live, other=1.0)
    stored: tl.constexpr = target_ptr.dtype.element_ty
    given: tl.constexpr = source_ptr.dtype.element_ty
    if ROPE == NO_ROPE:
        dims = tl.arange(0, BLOCK_D)[None, :]
        mask = live & (dims < DIM)
        x = tl.load(source + dims, mask=mask, other=0.0).to(tl.float32)
        tl.store(target + dims, quantise(x, scale, LIMIT).to(stored), mask=mask)
    else:
        pair = tl.arange(0, PAIRS)[None, :]
        mask = live & (pair < num_pairs)
        first, second = load_pairs(source, pair, mask, num_pairs, PAIRS, ROPE == INTERLEAVED)
        first, second = rotate_pairs(first, second, cos, sin)
        first = quantise(first.to(given).to(tl.float32), scale, LIMIT)
        second = quantise(second.to(given).to(tl.float32), scale, LIMIT)
        store_pairs(target, first, second, pair, mask, num_pairs, PAIRS, ROPE == INTERLEAVED)
        if ALL and REST > 0:
            dims = 2 * num_pairs + tl.arange(0, REST)[None, :]
            mask = live & (dims < DIM)
            x = tl.load(source + dims, mask=mask, other=0.0).to(tl.float32)
            tl.store(target + dims, quantise(x, scale, LIMIT).to(stored), mask=mask)


@triton.jit(do_not_specialize=["num_requests"])
def append_kernel(
    k_ptr, v_ptr, q_ptr, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, k_scale, v_scale,
    q_indptr_ptr, kv_lens_ptr, table_ptr, table_row_ptr, kv_indptr_ptr, slots_ptr, cos_sin_ptr, inv_freq_ptr,
    attention_factor, num_requests, num_kv_heads, num_q_heads, num_pairs,
    k_stride_token, k_stride_head, v_stride_token, v_stride_head, q_stride_token, q_stride_head,
    k_cache_stride_page, k_cache_stride_token, k_cache_stride_head,
    v_cache_stride_page, v_cache_stride_token, v_cache_stride_head,
    table_stride, cos_sin_stride, k_scale_stride, v_scale_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr, PAGE_SIZE: tl.constexpr, ADDRESSING: tl.constexpr, TABLE_ROW: tl.constexpr,
    ROPE: tl.constexpr, USE_TABLE: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Program (row, part): parts are blocks of HEADS heads of K, then of V, then of q."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    num_kv_parts = tl.cdiv(num_kv_heads, HEADS)
    if token < tl.load(q_indptr_ptr + num_requests):
        request = token * 0
        position = token * 0
        if ADDRESSING != SLOTS or ROPE != NO_ROPE:
            request = request_of(token, q_indptr_ptr, num_requests)
            position = token - tl.load(q_indptr_ptr + request + 1) + tl.load(kv_lens_ptr + request)
        rotatable = position >= 0
        cos = tl.zeros((1, PAIRS), tl.float32)
        sin = cos
        if ROPE != NO_ROPE:
            pair = tl.arange(0, PAIRS)[None, :]
            cos, sin = rope_cos_sin(
                tl.maximum(position, 0), pair, pair < num_pairs, num_pairs, cos_sin_ptr, cos_sin_stride, inv_freq_ptr,
                attention_factor, USE_TABLE,
            )  # fmt: skip
        if part >= 2 * num_kv_parts:
            if rotatable:
                rows = q_ptr + token * q_stride_token
                write_heads(
                    rows, rows, k_scale_ptr, 1.0, 0, num_q_heads, (part - 2 * num_kv_parts) * HEADS, q_stride_head,
                    q_stride_head, cos, sin, num_pairs, HEADS, DIM, BLOCK_D, PAIRS, REST, ROPE, False, 0, False,
                )  # fmt: skip
        else:
            page, offset, placed = find_slot(
                token, request, position, table_ptr, table_row_ptr, kv_indptr_ptr, slots_ptr, table_stride,
                PAGE_SIZE, ADDRESSING, TABLE_ROW,
            )  # fmt: skip
            if placed & rotatable:
                if part < num_kv_parts:
                    write_heads(
                        k_ptr + token * k_stride_token,
                        k_cache_ptr + page * k_cache_stride_page + offset * k_cache_stride_token,
                        k_scale_ptr, k_scale, k_scale_stride, num_kv_heads, part * HEADS, k_stride_head, k_cache_stride_head,
                        cos, sin, num_pairs, HEADS, DIM, BLOCK_D, PAIRS, REST, ROPE, K_SCALE, LIMIT, True,
                    )  # fmt: skip
                else:
                    write_heads(
                        v_ptr + token * v_stride_token,
                        v_cache_ptr + page * v_cache_stride_page + offset * v_cache_stride_token,
                        v_scale_ptr, v_scale, v_scale_stride, num_kv_heads, (part - num_kv_parts) * HEADS,
                        v_stride_head, v_cache_stride_head,
                        cos, sin, num_pairs, HEADS, DIM_VO, BLOCK_DV, PAIRS, REST, 0, V_SCALE, LIMIT, True,
                    )  # fmt: skip


def append_kv(k: Tensor, v: Tensor, kv: KVCache, batch: Batch, rope: RopeTable | None, q: Tensor | None) -> None:
    """The ``AppendKV`` protocol: k [T, Hkv, D] and v [T, Hkv, Dv] into ``kv``, q [T, Hq, D] rotated in place."""
    num_tokens, num_heads, dim = k.shape
    dim_vo = v.shape[2]
    if num_tokens == 0 or batch.size == 0:
        return
    block_d, block_dv = triton.next_power_of_2(dim), triton.next_power_of_2(dim_vo)
    widest_heads = max(num_heads, 0 if q is None else q.shape[1])
    heads = max(1, min(triton.next_power_of_2(widest_heads), _ELEMENTS // max(block_d, block_dv)))
    parts = 2 * triton.cdiv(num_heads, heads) + (0 if q is None else triton.cdiv(q.shape[1], heads))
    num_pairs = 0 if rope is None else rope.config.rotary_dim // 2
    rest = dim - 2 * num_pairs
    addressing = batch.table_form if batch.slot_mapping is None else "slots"
    with on_device(k.device):
        append_kernel[(num_tokens, parts)](
            *_pointers(k, v, kv, batch, rope, q),
            1.0 if rope is None else rope.config.attention_factor,
            batch.size,
            num_heads,
            0 if q is None else q.shape[1],
            num_pairs,
            *_strides(k, v, kv, batch, rope, q),
            HEADS=heads,
            DIM=dim,
            BLOCK_D=block_d,
            DIM_VO=dim_vo,
            BLOCK_DV=block_dv,
            PAIRS=triton.next_power_of_2(max(num_pairs, 1)),
            REST=triton.next_power_of_2(rest) if rest else 0,
            PAGE_SIZE=kv.page_size or 0,
            ADDRESSING=3 if addressing == "slots" else _ADDRESSING[addressing],
            TABLE_ROW=batch.table_row is not None,
            ROPE=0 if rope is None else _PAIRS[rope.config.pairs],
            USE_TABLE=rope is not None and rope.cos_sin is not None,
            K_SCALE=isinstance(kv.k_scale, Tensor),
            V_SCALE=isinstance(kv.v_scale, Tensor),
            LIMIT=_largest(kv),
            num_warps=2,
        )


def _largest(kv: KVCache) -> float:
    """The largest finite value of an FP8 cache, 0 for other formats."""
    name = kv.format or ""
    return torch.finfo(KV_FORMATS[name]).max if name.startswith("fp8") else 0.0


def _pointers(
    k: Tensor, v: Tensor, kv: KVCache, batch: Batch, rope: RopeTable | None, q: Tensor | None
) -> tuple[Tensor | float, ...]:
    """The kernel's tensors (and the scales given as numbers) in order; an absent one is replaced by one that is there and
    that the kernel then does not read."""
    k_cache, v_cache = kv.typed()
    ints = batch.q_indptr
    scales: list[Tensor | float] = [scale if isinstance(scale, Tensor) else k for scale in (kv.k_scale, kv.v_scale)]
    scales += [1.0 if scale is None or isinstance(scale, Tensor) else scale for scale in (kv.k_scale, kv.v_scale)]
    indptr = batch.table_indptr if batch.table_indptr is not None else batch.kv_indptr
    cos_sin = None if rope is None else rope.cos_sin
    return (
        k,
        v,
        k if q is None else q,
        k_cache,
        v_cache,
        *scales,
        ints,
        batch.kv_lens,
        ints if batch.table is None else batch.table,
        ints if batch.table_row is None else batch.table_row,
        ints if indptr is None else indptr,
        ints if batch.slot_mapping is None else batch.slot_mapping,
        k if cos_sin is None else cos_sin,
        k if rope is None else rope.inv_freq,
    )


def _strides(
    k: Tensor, v: Tensor, kv: KVCache, batch: Batch, rope: RopeTable | None, q: Tensor | None
) -> tuple[int, ...]:
    strides = [k.stride(0), k.stride(1), v.stride(0), v.stride(1)]
    strides += [0, 0] if q is None else [q.stride(0), q.stride(1)]
    for cache in kv.as_nhd():
        strides += [cache.stride(0) if kv.is_paged else 0, cache.stride(-3), cache.stride(-2)]
    strides.append(batch.table.stride(0) if batch.table is not None and batch.table.dim() == 2 else 0)
    strides.append(0 if rope is None or rope.cos_sin is None else rope.cos_sin.stride(0))
    strides += [int(isinstance(scale, Tensor) and scale.numel() > 1) for scale in (kv.k_scale, kv.v_scale)]
    return tuple(strides)


def load_kernel() -> object:
    """What the kernel entry loads."""
    return append_kv
