"""Write new keys and values into a KV cache: the contract and the public function.

Sources: paged caches (Kwon et al., 2023, section 4); rotary embedding (Su et al., 2021, section 3.4); FP8 formats
(Micikevicius et al., 2022, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import library
from ..batches import check_batch, check_lengths
from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..errors import ArgumentError
from ..records import Batch, KVCache
from ..remembered import Remembered
from ..rope import RopeConfig, RopeTable, YarnScaling
from ..settings import settings
from .arguments import call_checked, check_float, check_like, check_writable
from .caches import check_cache, check_strides


def _cases() -> Iterator[Case]:
    from .cases.append_kv import cases

    return cases()


OPERATION = Operation(
    name="append_kv",
    summary="write new K and V into a paged or ragged cache, with RoPE and FP8 quantisation fused",
    fields={
        "dtype": "dtype of k, v and q",
        "kv_format": "storage format of the cache",
        "head_dim": "width of a K head",
        "head_dim_vo": "width of a V head",
        "page_size": "tokens a page, None with a ragged cache",
        "kv_layout": "'NHD' or 'HND'",
        "addressing": "'dense', 'indptr' or 'ragged' (positions through the table) or 'slots' (slot_mapping)",
        "rope": "'none', 'half' or 'interleaved'",
        "rope_source": "'none', 'table' (cos_sin given) or 'computed'",
    },
    typical={
        "dtype": torch.bfloat16,
        "kv_format": "bf16",
        "head_dim": 128,
        "head_dim_vo": 128,
        "page_size": 16,
        "kv_layout": "NHD",
        "addressing": "dense",
        "rope": "none",
        "rope_source": "none",
    },
    cases=_cases,
)

_dispatch = Dispatcher(
    "append_kv",
    "dtype",
    "kv_format",
    "head_dim",
    "head_dim_vo",
    "page_size",
    "kv_layout",
    "addressing",
    "rope",
    "rope_source",
)


def append_kv(
    k: Tensor, v: Tensor, kv: KVCache, batch: Batch, *, rope: RopeTable | None = None, q: Tensor | None = None
) -> None:
    """Write ``k`` [T, Hkv, D] and ``v`` [T, Hkv, Dv] into ``kv``, in place.

    Token i of request b (row q_indptr[b] + i) goes to position kv_lens[b] - q_len + i of the request's keys, found
    through the batch's table or kv_indptr; with ``batch.slot_mapping`` (int64 [T], one element a row of k) to that slot
    instead: page * page_size + offset, or the row of a ragged cache; slots below 0 are skipped, and so are rows past
    q_indptr[B]. Two rows must not name one slot. A position below 0 (q_len > kv_len) is skipped where it matters: through
    a table or kv_indptr, and with ``rope``.

    ``rope`` rotates K at its position (also with slot_mapping) before it is stored, computed in float32 (float64 for
    float64) and rounded to k's dtype; ``q`` [T, Hq, D], which needs ``rope``, is rotated in place, also where the slot
    is below 0. FP8 formats store x / scale, an IEEE float32 division, saturated to the largest finite value and rounded
    to nearest even (infinities saturate, NaN stays NaN). All tensors are on one device; the last
    dims are contiguous, other strides multiples of 16 bytes. Stream-ordered, no synchronisation. Raises ArgumentError
    (LayoutError, an UnsupportedError too, for other strides) and UnsupportedError.
    """
    compiling = torch.compiler.is_compiling()
    if compiling or _checked_batches.get(batch) is None:
        check_batch(batch)
        if not compiling:
            _checked_batches.put(batch, True)
    _check_tokens(k, v, kv, batch)
    _check_rope(k, q, rope)
    if compiling:
        _compiled(k, v, kv, batch, rope, q)
        return
    check_strides("k", k)
    check_strides("v", v)
    if q is not None:
        check_strides("q", q)
        check_writable("q", q)
    _check_cache(k, v, kv)
    if k.is_cpu:
        check_lengths(batch, kv.page_size, None)
        if k.shape[0] < (num_tokens := int(batch.q_indptr[-1])):
            raise ArgumentError("k", f"at least {num_tokens} rows, the batch's tokens", k.shape[0])
    if settings().check or settings().shadow > 0:
        _observed(k, v, kv, batch, rope, q)
        return
    call_checked(_run, (k, v, kv, batch, rope, q), lambda: _check_indices(k, kv, batch, rope))


def _run(k: Tensor, v: Tensor, kv: KVCache, batch: Batch, rope: RopeTable | None, q: Tensor | None) -> None:
    addressing = batch.table_form if batch.slot_mapping is None else "slots"
    pairs = "none" if rope is None else rope.config.pairs
    source = "none" if rope is None else "computed" if rope.cos_sin is None else "table"
    dims = (k.shape[2], v.shape[2])
    kernel = _dispatch(k.device, k.dtype, kv.format, *dims, kv.page_size, kv.layout, addressing, pairs, source)
    kernel(k, v, kv, batch, rope, q)


def _check_indices(k: Tensor, kv: KVCache, batch: Batch, rope: RopeTable | None) -> None:
    from .. import checks

    checks.check_append(k, kv, batch, rope)


def _observed(k: Tensor, v: Tensor, kv: KVCache, batch: Batch, rope: RopeTable | None, q: Tensor | None) -> None:
    """The call in checked or shadow mode."""
    from .. import shadow

    if settings().check:
        _check_indices(k, kv, batch, rope)
    compare = shadow.prepare_append(k, v, kv, batch, rope, q)
    _run(k, v, kv, batch, rope, q)
    compare()


_checked_batches: Remembered[bool] = Remembered()
_checked_caches: Remembered[tuple[object, ...]] = Remembered()


def _check_cache(k: Tensor, v: Tensor, kv: KVCache) -> None:
    form = (k.shape[1], k.shape[2], v.shape[2], k.device)
    if _checked_caches.get(kv) != form:
        check_writable("kv.k", kv.k)
        check_writable("kv.v", kv.v)
        check_cache(kv, *form)
        _checked_caches.put(kv, form)


def _check_tokens(k: Tensor, v: Tensor, kv: KVCache, batch: Batch) -> None:
    if k.dim() != 3 or k.shape[1] != kv.num_kv_heads:
        raise ArgumentError("k", f"[T, {kv.num_kv_heads}, D]", list(k.shape))
    if v.dim() != 3 or v.shape[:2] != k.shape[:2] or v.dtype != k.dtype or v.device != k.device:
        expected = f"{k.dtype} {[*k.shape[:2], 'Dv']} on {k.device} like k"
        raise ArgumentError("v", expected, f"{v.dtype} {list(v.shape)} on {v.device}")
    check_float("k", k)
    if batch.q_indptr.device != k.device:  # all tensors of a checked batch are on one device
        raise ArgumentError("batch.q_indptr", f"a tensor on {k.device} like k", batch.q_indptr.device)
    if batch.slot_mapping is not None:
        if batch.slot_mapping.shape[0] != k.shape[0]:
            raise ArgumentError(
                "batch.slot_mapping", f"int64 [{k.shape[0]}], one a row of k", list(batch.slot_mapping.shape)
            )
    elif kv.is_paged != (batch.table is not None):
        expected = "a table with a paged cache" if kv.is_paged else "kv_indptr with a ragged cache"
        raise ArgumentError("batch", expected, batch.table_form)


def _check_rope(k: Tensor, q: Tensor | None, rope: RopeTable | None) -> None:
    if rope is None:
        if q is not None:
            raise ArgumentError("q", "None without rope", "a tensor")
        return
    if rope.config.rotary_dim > k.shape[2]:
        raise ArgumentError("rope.config.rotary_dim", f"at most head_dim={k.shape[2]}", rope.config.rotary_dim)
    rope.check("rope", k.device)
    if q is not None:
        if q.dim() != 3:
            raise ArgumentError("q", "[T, Hq, D]", list(q.shape))
        check_like("q", q, k, (k.shape[0], q.shape[1], k.shape[2]))


_BATCH_FIELDS = ("q_indptr", "kv_lens", "table", "table_row", "table_indptr", "kv_indptr", "slot_mapping")


def _compiled(k: Tensor, v: Tensor, kv: KVCache, batch: Batch, rope: RopeTable | None, q: Tensor | None) -> None:
    """What torch.compile traces: one opaque operator."""
    lengths = [getattr(batch, name) for name in _BATCH_FIELDS]
    rotation = (
        ("none", 0, 1.0) if rope is None else (rope.config.pairs, rope.config.rotary_dim, rope.config.attention_factor)
    )
    tables = (None, None) if rope is None else (rope.inv_freq, rope.cos_sin)
    _OP(k, v, kv.k, kv.v, *library.cache_details(kv), lengths, *rotation, *tables, q)


def _run_flat(*flat: Any) -> None:
    """The operator's arguments, in the order of its schema."""
    k, v, k_cache, v_cache, layout, kv_format, scales, scale_values, lengths, *rotation, inv_freq, cos_sin, q = flat
    pairs, rotary_dim, attention_factor = rotation
    rope = None
    if inv_freq is not None:
        # inv_freq already holds the scaling; of it kernels read the attention factor only.
        scaling = YarnScaling(1.0, 1, attention_factor=attention_factor)
        rope = RopeTable(RopeConfig(rotary_dim, pairs=pairs, scaling=scaling), inv_freq, cos_sin)
    batch = Batch(**dict(zip(_BATCH_FIELDS, lengths, strict=True)))
    kv = library.cache_of(k_cache, v_cache, layout, kv_format, scales, scale_values)
    append_kv(k, v, kv, batch, rope=rope, q=q)


_OP = library.register(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, str layout, str kv_format, "
    "Tensor?[] scales, float[] scale_values, Tensor?[] lengths, str pairs, int rotary_dim, float attention_factor, "
    "Tensor? inv_freq, Tensor? cos_sin, Tensor(c!)? q) -> ()",
    _run_flat,
)


def append_kv_cost(
    k: Tensor, v: Tensor, kv: KVCache, batch: Batch, *, rope: RopeTable | None = None, q: Tensor | None = None
) -> Cost:
    """Fewest bytes (k and v read, the cache written, q read and written, a row of the RoPE table read for each position
    that occurs) and no FLOPs: those of RoPE and rounding hide behind the bytes. Reads the batch's lengths."""
    num_bytes = k.numel() * (k.element_size() + kv.k.element_size()) + v.numel() * (
        v.element_size() + kv.v.element_size()
    )
    if q is not None:
        num_bytes += 2 * q.numel() * q.element_size()
    if rope is not None and rope.cos_sin is not None:
        lengths = zip(batch.q_indptr.diff().tolist(), batch.kv_lens.tolist(), strict=True)
        positions = {at for q_len, kv_len in lengths for at in range(max(kv_len - q_len, 0), kv_len)}
        num_bytes += len(positions) * rope.cos_sin.shape[1] * rope.cos_sin.element_size()
    return Cost(num_bytes, 0)
