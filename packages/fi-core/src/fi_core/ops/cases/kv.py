"""KV caches and batches for conformance cases: shuffled pages, poisoned unused slots, every layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...records import KV_FORMATS, KVCache, KVFormat, KVLayout, TableForm
from ...reference.append_kv import bytes_view, quantise

ScaleForm = Literal["none", "float", "tensor", "heads"]

_NAN_BYTE = 0x7F
"""NaN in both FP8 formats."""


@dataclass(frozen=True)
class CacheForm:
    """How a case keeps K and V.

    ``storage``: two tensors, views of one tensor with K and V in turn, or rows that are wider than a head. ``scale``: no
    scale, a float, a scalar tensor, or one a head. ``table_row`` puts the rows of a dense table out of order.
    ``first_page`` leaves that many pages unused (and, if not 0, unwritten) before the others. ``run``: so many pages follow
    each other, as allocators give them; 1: each lies anywhere.
    """

    num_heads: int
    head_dim: int
    head_dim_vo: int
    kv_format: KVFormat
    page_size: int | None = 16
    kv_layout: KVLayout = "NHD"
    table: TableForm = "dense"
    storage: Literal["separate", "interleaved", "padded"] = "separate"
    scale: ScaleForm = "none"
    as_bytes: bool = False
    table_row: bool = False
    first_page: int = 0
    run: int = 1


@dataclass(frozen=True)
class CacheInputs:
    """A cache, the batch's fields that say where requests lie in it, and (block, offset) int64 of all their tokens in
    request order."""

    kv: KVCache
    fields: dict[str, Tensor]
    block: Tensor
    offset: Tensor


def indptr_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """int32 [len + 1]: running sum from 0."""
    total = [0]
    for length in lengths:
        total.append(total[-1] + length)
    return torch.tensor(total, dtype=torch.int32, device=device)


def make_cache(
    form: CacheForm, kv_lens: Sequence[int], device: torch.device, generator: torch.Generator
) -> CacheInputs:
    """A cache with room for ``kv_lens`` tokens, normally distributed in their slots, NaN and infinity everywhere else."""
    if form.table == "ragged":
        num_blocks, fields, block, offset = _ragged(kv_lens, device)
    else:
        num_blocks, fields, block, offset = _paged(form, kv_lens, device, generator)
    k, v = _allocate(form, num_blocks, device)
    scales = [make_scale(form.scale, form.num_heads, device, generator) for _ in range(2)]
    kv = KVCache(k, v, form.kv_layout, form.kv_format, *scales)
    where = (block, offset) if kv.is_paged else (block,)
    for cache, scale in zip(kv.as_nhd(), scales, strict=True):
        values = torch.randn(block.shape[0], form.num_heads, cache.shape[-1], generator=generator).to(device)
        bytes_view(cache)[where] = bytes_view(quantise(values, form.kv_format, scale, torch.float32))
    return CacheInputs(kv, fields, block, offset)


def tilt(q: Tensor, cache: CacheInputs, kv_lens: Sequence[int], steep: float) -> None:
    """Lets the logits of q [T, Hq, D] fall from about ``steep`` to -``steep`` over each request's keys (of 16 bits), so that
    whoever begins with the last key meets the largest ones late; 0 changes nothing."""
    if not steep:
        return
    q[..., 0] = height = (steep * q.shape[-1] ** 0.5) ** 0.5
    falling = torch.cat([torch.linspace(height, -height, length) for length in kv_lens])
    keys = cache.kv.as_nhd()[0]
    where = (cache.block, cache.offset) if cache.kv.is_paged else (cache.block,)
    keys[(*where, slice(None), 0)] = falling.to(keys.device, keys.dtype).unsqueeze(1)


def _paged(
    form: CacheForm, kv_lens: Sequence[int], device: torch.device, generator: torch.Generator
) -> tuple[int, dict[str, Tensor], Tensor, Tensor]:
    size = form.page_size or 1
    counts = [math.ceil(length / size) for length in kv_lens]
    num_used = sum(counts) + 2
    runs = torch.randperm(-(-num_used // form.run), generator=generator) * form.run + form.first_page
    ids = [page for first in runs.tolist() for page in range(first, min(first + form.run, form.first_page + num_used))]
    stale, pages, taken = ids[-1], [], 0
    for count in counts:
        pages.append(ids[taken : taken + count])
        taken += count
    block = [own[position // size] for own, length in zip(pages, kv_lens, strict=True) for position in range(length)]
    offset = [position % size for length in kv_lens for position in range(length)]
    where = (
        torch.tensor(block, dtype=torch.int64, device=device),
        torch.tensor(offset, dtype=torch.int64, device=device),
    )
    if form.table == "indptr":
        flat = torch.tensor([page for own in pages for page in own] + [stale], dtype=torch.int32, device=device)
        return form.first_page + num_used, {"table": flat, "table_indptr": indptr_of(counts, device)}, *where
    width = max(counts, default=0) + 1
    # Entries that no request uses name a page of NaN.
    table = torch.full((len(kv_lens) + 2 * form.table_row, width), stale, dtype=torch.int32)
    rows = (
        torch.randperm(table.shape[0], generator=generator)[: len(kv_lens)] if form.table_row else range(len(kv_lens))
    )
    for row, own in zip(rows, pages, strict=True):
        table[int(row), : len(own)] = torch.tensor(own, dtype=torch.int32)
    fields = {"table": table.to(device)}
    if isinstance(rows, Tensor):
        fields["table_row"] = rows.to(device=device, dtype=torch.int32)
    return form.first_page + num_used, fields, *where


def _ragged(kv_lens: Sequence[int], device: torch.device) -> tuple[int, dict[str, Tensor], Tensor, Tensor]:
    room = [length + 1 + request % 3 for request, length in enumerate(kv_lens)]
    indptr = indptr_of(room, device)
    starts = indptr.tolist()
    rows = [starts[request] + position for request, length in enumerate(kv_lens) for position in range(length)]
    block = torch.tensor(rows, dtype=torch.int64, device=device)
    return starts[-1] + 1, {"kv_indptr": indptr}, block, torch.zeros_like(block)


def _allocate(form: CacheForm, num_blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    inner: tuple[int, ...] = (form.num_heads,) if form.page_size is None else (form.page_size, form.num_heads)
    shape = (num_blocks, *inner)
    if form.kv_layout == "HND":
        shape = (*shape[:-2], shape[-1], shape[-2])
    dtype = torch.uint8 if form.as_bytes else KV_FORMATS[form.kv_format]
    dims = (form.head_dim, form.head_dim_vo)
    if form.storage == "interleaved":
        whole = _poisoned((shape[0], 2, *shape[1:], max(dims)), dtype, device, form)
        return whole[:, 0, ..., : dims[0]], whole[:, 1, ..., : dims[1]]
    extra = 16 if form.storage == "padded" else 0
    k, v = (_poisoned((*shape, dim + extra), dtype, device, form)[..., :dim] for dim in dims)
    return k, v


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, form: CacheForm) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if form.first_page:
        return tensor
    if dtype.itemsize == 1:
        tensor.view(torch.uint8).fill_(_NAN_BYTE)
    else:
        tensor.fill_(math.nan)
        tensor[..., ::2] = math.inf
    return tensor


def make_scale(
    form: ScaleForm, num_heads: int, device: torch.device, generator: torch.Generator
) -> float | Tensor | None:
    """An FP8 scale for normally distributed values."""
    if form == "none":
        return None
    if form == "float":
        return 0.0625
    shape = (num_heads,) if form == "heads" else ()
    return (torch.rand(shape, generator=generator) * 0.1 + 0.02).to(device)
