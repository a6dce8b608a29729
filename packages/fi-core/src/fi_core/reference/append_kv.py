"""Reference of ``append_kv``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..records import KV_FORMATS, Batch, KVCache
from ..rope import RopeTable
from . import serving_dtype
from .paging import locate, token_positions
from .quantised import quantised
from .rope import apply_rope


@dataclass(frozen=True)
class Appended:
    """What an append writes: values k [n, Hkv, D] and v [n, Hkv, Dv] in the storage dtype at (block, offset) int64 [n],
    and the rotated rows q [m, Hq, D] (None without q) at rows ``q_rows`` int64 [m] of q."""

    block: Tensor
    offset: Tensor
    k: Tensor
    v: Tensor
    q_rows: Tensor
    q: Tensor | None


def quantise(x: Tensor, kv_format: str, scale: float | Tensor | None, compute_dtype: torch.dtype) -> Tensor:
    """x [n, H, D] as the cache stores it.

    FP8: x / scale in ``compute_dtype``, saturated to the format's largest finite value, rounded to nearest even; NaN
    stays NaN. Others: a cast, which keeps the bits of a dtype that is stored as it is.
    """
    dtype = KV_FORMATS[kv_format]
    if not kv_format.startswith("fp8"):
        return x.to(dtype)
    heads = scale.view(-1, 1) if isinstance(scale, Tensor) else scale
    return quantised(x.to(compute_dtype), heads, dtype)


def appended(
    k: Tensor,
    v: Tensor,
    kv: KVCache,
    batch: Batch,
    rope: RopeTable | None,
    q: Tensor | None,
    compute_dtype: torch.dtype,
) -> Appended:
    """What ``append_kv`` with these arguments writes; writes nothing itself."""
    row, request, position = token_positions(batch, k.shape[0])
    if batch.slot_mapping is None or rope is not None:
        # A position below 0 has neither an angle nor a slot of its own.
        row, request, position = (part[position >= 0] for part in (row, request, position))
    if batch.slot_mapping is None:
        kept = torch.ones_like(row, dtype=torch.bool)
        block, offset = locate(batch, request, position, kv.page_size)
    else:
        slot = batch.slot_mapping[row]
        kept = slot >= 0
        block, offset = slot[kept], torch.zeros_like(slot[kept])
        if kv.page_size is not None:
            block, offset = block // kv.page_size, block % kv.page_size
    written = row[kept]
    keys = k[written]
    if rope is not None:
        keys = apply_rope(keys, position[kept], rope, compute_dtype).to(k.dtype)
        q = None if q is None else apply_rope(q[row], position, rope, compute_dtype).to(q.dtype)
    stored_k = quantise(keys, kv.format or "", kv.k_scale, compute_dtype)
    stored_v = quantise(v[written], kv.format or "", kv.v_scale, compute_dtype)
    return Appended(block, offset, stored_k, stored_v, row, q)


def bytes_view(tensor: Tensor) -> Tensor:
    """FP8 as bytes, which every index operation knows; others unchanged."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def append_kv(
    k: Tensor,
    v: Tensor,
    kv: KVCache,
    batch: Batch,
    rope: RopeTable | None,
    q: Tensor | None,
    compute_dtype: torch.dtype | None = None,
) -> None:
    """The ``AppendKV`` protocol; ``compute_dtype`` None: float32 (float64 for float64)."""
    result = appended(k, v, kv, batch, rope, q, compute_dtype or serving_dtype(k.dtype))
    if k.device.type == "cpu" and (result.block < 0).any():
        # As an index it would count from the end.
        raise IndexError("a page id is negative")
    where = (result.block, result.offset) if kv.is_paged else (result.block,)
    for cache, values in zip(kv.as_nhd(), (result.k, result.v), strict=True):
        bytes_view(cache)[where] = bytes_view(values)
    if q is not None and result.q is not None:
        q[result.q_rows] = result.q
