"""Reference of ``attention``: exact softmax over gathered keys, vectorised over requests of one query length.

With compute_dtype=float64 it is the oracle; with float32 it serves on a CPU. ``update`` sorts the batch into groups that
all layers share; ``run`` gathers each group's keys and values once and does two batched matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..records import KV_FORMATS, AttentionSpec, Batch, Capacity, KVCache, PackedMask, ResolvedLayer
from ..rope import RopeTable
from . import serving_dtype
from .paging import locate
from .rope import apply_rope

_MAX_LOGITS = 1 << 23
"""Logits that one group may hold: bounds the memory of long prefills, which are cut into chunks of tokens."""
_SHORT = 64
"""Requests of up to this many keys share a group whatever their lengths: padding is cheaper than another group."""


@dataclass(frozen=True)
class _Chunk:
    """``num_tokens`` consecutive tokens of one request from row ``row`` of q, and the keys [start, stop) they may see."""

    request: int
    row: int
    num_tokens: int
    first_position: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Group:
    """n chunks of equally many tokens t, padded to one number of keys L.

    ``rows`` int64 [n * t] of q; ``position`` int64 [n, t] of the queries; ``column`` int64 [n, L] of the keys; ``blocks``
    and ``offsets`` int64 [n, L]: page and token in it (ragged: row and 0) of each key; ``distance`` int64 [n, t, L]: key
    position - query position; ``visible`` bool [n, t, L], None: all.
    """

    rows: Tensor
    position: Tensor
    column: Tensor
    blocks: Tensor
    offsets: Tensor
    distance: Tensor
    visible: Tensor | None
    indices: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def gather(self, cache: Tensor, num_heads: int) -> Tensor:
        """Keys or values [n, H, L, D] of ``cache``, [P, S, H, D] or [tokens, H, D] with any strides."""
        if cache.shape[0] == 0:
            raise IndexError("the cache holds nothing")
        *outer, head_stride, _ = cache.stride()
        block_stride, token_stride = (outer[0], outer[1]) if len(outer) == 2 else (outer[0], 0)
        strides = (block_stride, token_stride, head_stride, num_heads)
        # Rows of ``unit`` elements' pitch overlap, but name every (token, head) of whatever layout by one number.
        unit = math.gcd(block_stride, token_stride, head_stride) or 1
        index = self.indices.get(strides)
        if index is None:
            base = (self.blocks * block_stride + self.offsets * token_stride) // unit
            heads = torch.arange(num_heads, device=base.device) * (head_stride // unit)
            index = self.indices[strides] = (base[:, None, :] + heads[:, None]).flatten()
        width = cache.shape[-1]
        reach = sum((size - 1) * stride for size, stride in zip(cache.shape[:-1], cache.stride(), strict=False))
        flat = cache.as_strided((reach // unit + 1, width), (unit, 1))
        num, length = self.blocks.shape
        return flat.index_select(0, index).view(num, num_heads, length, width)


class ReferenceState:
    """The AttentionState: groups of the last update's batch, made per window at the first call that picks it."""

    def __init__(self, spec: AttentionSpec, device: torch.device, compute_dtype: torch.dtype) -> None:
        self.spec = spec
        self.device = device
        self.compute_dtype = compute_dtype
        self._batch: Batch | None = None
        self._q_indptr: list[int] = []
        self._kv_lens: list[int] = []
        self._groups: dict[int | None, tuple[list[_Group], Tensor]] = {}

    @property
    def workspace(self) -> Sequence[Tensor]:
        return ()

    def describe(self) -> Sequence[str]:
        return (f"torch reference computing in {self.compute_dtype}; update reads the lengths on the host",)

    def update(self, batch: Batch) -> None:
        self._batch = batch
        self._q_indptr = batch.q_indptr.tolist()
        self._kv_lens = batch.kv_lens.tolist()
        self._groups = {}

    def run(self, q: Tensor, kv: KVCache, layer: ResolvedLayer, out: Tensor, lse: Tensor | None) -> None:
        found = self._groups.get(layer.window)
        if found is None:
            found = self._groups[layer.window] = self._build(layer.window)
        groups, blind = found
        for group in groups:
            value, log_sum = self._attend(group, q, kv, layer)
            out[group.rows] = value.to(out.dtype)
            if lse is not None:
                lse[group.rows] = log_sum.to(lse.dtype)
        if blind.numel():
            out[blind] = 0.0
            if lse is not None:
                lse[blind] = -math.inf if layer.sinks is None else layer.sinks.to(lse.dtype)

    def _build(self, window: int | None) -> tuple[list[_Group], Tensor]:
        chunks = [chunk for request in range(len(self._kv_lens)) for chunk in self._chunks(request, window)]
        blind = [
            row
            for chunk in chunks
            if chunk.stop <= chunk.start
            for row in range(chunk.row, chunk.row + chunk.num_tokens)
        ]
        seeing = [chunk for chunk in chunks if chunk.stop > chunk.start]
        groups = [self._group(members, window) for members in self._partition(seeing)]
        return groups, torch.tensor(blind, dtype=torch.int64, device=self.device)

    def _chunks(self, request: int, window: int | None) -> list[_Chunk]:
        row, row_end = self._q_indptr[request : request + 2]
        kv_len = self._kv_lens[request]
        size = max(1, _MAX_LOGITS // (self.spec.num_qo_heads * max(1, kv_len)))
        chunks = []
        for first in range(row, row_end, size):
            num_tokens = min(size, row_end - first)
            position = kv_len - (row_end - first)
            start = 0 if window is None else max(0, position - window + 1)
            stop = max(0, position + num_tokens) if self.spec.causal else kv_len
            chunks.append(_Chunk(request, first, num_tokens, position, start, stop))
        return chunks

    def _partition(self, chunks: list[_Chunk]) -> list[list[_Chunk]]:
        """Chunks of equal token counts and similar key counts together; alone if a mask has to be unpacked, or if
        padding may not depend on the other requests."""
        assert self._batch is not None
        if self._batch.mask is not None or self.spec.batch_invariant:
            return [[chunk] for chunk in chunks]
        parts: list[list[_Chunk]] = []
        for chunk in sorted(chunks, key=lambda item: (item.num_tokens, item.start - item.stop)):
            head = parts[-1][0] if parts else None
            if head is not None and head.num_tokens == chunk.num_tokens:
                longest = head.stop - head.start
                logits = (len(parts[-1]) + 1) * chunk.num_tokens * longest * self.spec.num_qo_heads
                if logits <= _MAX_LOGITS and longest <= max(_SHORT, 2 * (chunk.stop - chunk.start)):
                    parts[-1].append(chunk)
                    continue
            parts.append([chunk])
        return parts

    def _group(self, chunks: list[_Chunk], window: int | None) -> _Group:
        assert self._batch is not None
        fields = [(c.request, c.row, c.first_position, c.start, c.stop) for c in chunks]
        request, row, first, start, stop = torch.tensor(fields, dtype=torch.int64, device=self.device).T.unsqueeze(2)
        token = torch.arange(chunks[0].num_tokens, device=self.device)
        column = torch.arange(max(c.stop - c.start for c in chunks), device=self.device)
        position = start + column
        # Padding repeats the last key, which the last token sees: no slot outside the request is ever read.
        blocks, offsets = locate(self._batch, request, torch.minimum(position, stop - 1), self.spec.page_size)
        distance = position[:, None, :] - (first + token)[:, :, None]
        visible = (position < stop)[:, None, :].expand_as(distance)
        if self.spec.causal:
            visible = visible & (distance <= 0)
        if window is not None:
            visible = visible & (distance > -window)
        if self._batch.mask is not None:
            visible = visible & self._unpack(self._batch.mask, chunks[0])
        everything = bool(visible.all())
        return _Group(
            (row + token).flatten(), first + token, position, blocks, offsets, distance, None if everything else visible
        )

    def _unpack(self, mask: PackedMask, chunk: _Chunk) -> Tensor:
        """bool [t, L]: what the packed mask says of a chunk's keys."""
        first_row, row_end = self._q_indptr[chunk.request : chunk.request + 2]
        kv_len, q_len = self._kv_lens[chunk.request], row_end - first_row
        width = (kv_len if mask.columns == "kv" else q_len) + 7 >> 3
        begin = int(mask.indptr[chunk.request]) + (chunk.row - first_row) * width
        if begin < 0 or begin + chunk.num_tokens * width > mask.bits.shape[0]:
            raise IndexError("a request's mask lies outside the bits")
        packed = mask.bits.to(self.device)[begin : begin + chunk.num_tokens * width].view(chunk.num_tokens, width)
        bits = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=self.device)) & 1
        column = torch.arange(chunk.start, chunk.stop, device=self.device)
        if mask.columns == "new":
            column = column - (kv_len - q_len)
        return bits.flatten(1).bool()[:, column.clamp(min=0)] | (column < 0)

    def _attend(self, group: _Group, q: Tensor, kv: KVCache, layer: ResolvedLayer) -> tuple[Tensor, Tensor]:
        """(out [rows, Hq, Dv], lse [rows, Hq]) of one group in the compute dtype."""
        spec, dtype = self.spec, self.compute_dtype
        heads, size = spec.num_kv_heads, spec.group_size
        num, length = group.blocks.shape
        tokens = group.rows.shape[0] // num
        k, v = (self._read(group, cache, kv.format or "") for cache in _as_nhd(kv))
        k_scale, v_scale = (_per_head(scale, heads, dtype, q.device) for scale in (kv.k_scale, kv.v_scale))
        rows = self._queries(group, q, layer).view(num, tokens, heads, size, spec.head_dim)
        if spec.rope is not None and spec.rope.keys and layer.rope is not None:
            k = _rotated(k.transpose(1, 2), group.column, layer.rope).transpose(1, 2).contiguous()
        rows = (
            (rows * (k_scale * layer.scale)).permute(0, 2, 3, 1, 4).reshape(num * heads, size * tokens, spec.head_dim)
        )
        logits = torch.bmm(rows, k.view(num * heads, length, spec.head_dim).transpose(1, 2))
        logits = self._shape_logits(logits.view(num, heads, size, tokens, length), group, layer)
        weights, log_sum = _softmax(logits, layer.sinks, heads)
        values = torch.bmm(weights.view(num * heads, size * tokens, length), v.view(num * heads, length, -1))
        values = values.view(num, heads, size, tokens, -1).permute(0, 3, 1, 2, 4) * v_scale
        shape = (num * tokens, spec.num_qo_heads)
        return values.reshape(*shape, -1), log_sum.permute(0, 3, 1, 2).reshape(shape)

    def _queries(self, group: _Group, q: Tensor, layer: ResolvedLayer) -> Tensor:
        """[n, t, Hq, D] in the compute dtype: the group's queries with their scale, rotated."""
        spec = self.spec
        stored = q.view(torch.uint8) if spec.q_is_fp8 else q
        rows = stored[group.rows].view(spec.q_dtype).to(self.compute_dtype)
        if layer.q_scale is not None:
            scale = layer.q_scale
            rows = rows * (scale.to(rows.dtype).view(-1, 1) if isinstance(scale, Tensor) else scale)
        rows = rows.view(*group.position.shape, spec.num_qo_heads, spec.head_dim)
        return rows if layer.rope is None else _rotated(rows, group.position, layer.rope)

    def _read(self, group: _Group, cache: Tensor, kv_format: str) -> Tensor:
        return group.gather(cache, self.spec.num_kv_heads).view(KV_FORMATS[kv_format]).to(self.compute_dtype)

    def _shape_logits(self, logits: Tensor, group: _Group, layer: ResolvedLayer) -> Tensor:
        """Soft-cap, then ALiBi, then the mask, on logits [n, Hkv, G, t, L]."""
        if layer.soft_cap is not None:
            logits = torch.tanh(logits / layer.soft_cap) * layer.soft_cap
        if layer.alibi_slopes is not None:
            slopes = layer.alibi_slopes.to(logits.dtype).view(self.spec.num_kv_heads, -1, 1, 1)
            logits = logits + slopes * group.distance[:, None, None]
        if group.visible is not None:
            logits = logits.masked_fill(~group.visible[:, None, None], -math.inf)
        return logits


def _as_nhd(kv: KVCache) -> tuple[Tensor, Tensor]:
    """K and V in NHD order; FP8 as bytes, which every index operation knows."""
    k, v = kv.as_nhd()
    return (k.view(torch.uint8), v.view(torch.uint8)) if k.element_size() == 1 else (k, v)


def _rotated(rows: Tensor, position: Tensor, table: RopeTable) -> Tensor:
    """``rows`` [n, L, H, D] rotated at their ``position`` int64 [n, L]."""
    return apply_rope(rows.flatten(0, 1), position.flatten(), table, rows.dtype).view(rows.shape)


def _per_head(scale: float | Tensor | None, heads: int, dtype: torch.dtype, device: torch.device) -> Tensor | float:
    """An FP8 scale that multiplies [..., Hkv, G, D]."""
    if scale is None:
        return 1.0
    if isinstance(scale, Tensor):
        return scale.to(dtype).expand(heads).view(heads, 1, 1)
    return float(scale)


def _softmax(logits: Tensor, sinks: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
    """(weights, log of their denominators) of logits [n, Hkv, G, t, L]; rows without a visible key get weights 0."""
    peak = logits.amax(dim=-1, keepdim=True)
    sink = None if sinks is None else sinks.to(logits.dtype).view(heads, -1, 1, 1)
    if sink is not None:
        peak = torch.maximum(peak, sink)
    peak = torch.where(peak == -math.inf, 0.0, peak)
    weights = torch.exp(logits - peak)
    total = weights.sum(dim=-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - peak)
    log_sum = (torch.log(total) + peak).squeeze(-1)
    return weights / torch.where(total == 0.0, 1.0, total), log_sum


class ReferenceAttention:
    """The AttentionKernel; ``compute_dtype`` None: float32, or float64 for float64 specs."""

    def __init__(self, compute_dtype: torch.dtype | None = None) -> None:
        self._compute_dtype = compute_dtype

    def workspace_bytes(self, spec: AttentionSpec, capacity: Capacity, device: str) -> int:
        return 0

    def plan(self, spec: AttentionSpec, capacity: Capacity, device: str) -> ReferenceState:
        return ReferenceState(spec, torch.device(device), self._compute_dtype or serving_dtype(spec.dtype))


def load_kernel() -> ReferenceAttention:
    """The kernel that the reference back end registers."""
    return ReferenceAttention()


def oracle(spec: AttentionSpec, batch: Batch, q: Tensor, kv: KVCache, layer: ResolvedLayer) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, Dv], lse [T, Hq]) in float64; rows past q_indptr[B] are NaN."""
    state = ReferenceState(spec, q.device, torch.float64)
    state.update(batch)
    out = q.new_full((q.shape[0], spec.num_qo_heads, spec.head_dim_vo or 0), math.nan, dtype=torch.float64)
    lse = q.new_full((q.shape[0], spec.num_qo_heads), math.nan, dtype=torch.float64)
    state.run(q, kv, layer, out, lse)
    return out, lse
