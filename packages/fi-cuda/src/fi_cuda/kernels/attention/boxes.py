"""Which K and V the copy engine can bring to the attention kernels, and their tensor maps (``fi/attention/load_boxes.cuh``,
``fi/attention/prefill_boxes.cuh``)."""

from __future__ import annotations

from fi_core.records import KVCache
from torch import Tensor

from ...params import TensorMap
from ...tensor_map import Box, tensor_map_of
from .tuning import swizzle_of

_PATTERN_TOKENS = 8
_MAX_STRIDE_BYTES = 2**40
_PROMOTION = 128  # bytes that L2 fetches at once: a column of a row. More is slower, also where rows are longer


def tokens_of_box(page_size: int | None, chunk_tokens: int) -> int | None:
    """Tokens that a box holds: a chunk's, or those of a page where it is smaller; None where pages and chunks do not fit
    into each other, or a box would not begin where the swizzle's pattern does."""
    size = chunk_tokens if page_size is None else page_size
    fits = size % chunk_tokens == 0 or chunk_tokens % size == 0
    tokens = min(size, chunk_tokens)
    return tokens if fits and tokens % _PATTERN_TOKENS == 0 else None


def maps_of(kv: KVCache, num_tokens: int) -> tuple[TensorMap, TensorMap] | None:
    """The maps of K and V with dims page (ragged: one), KV head, column of the swizzle's width, token, element, and boxes of
    ``num_tokens`` of a head; None for tensors that no map describes."""
    k, v = (tensor if kv.is_paged else tensor[None] for tensor in kv.as_nhd())
    if not (_describable(k) and _describable(v)):
        return None
    return _map_of(k, num_tokens), _map_of(v, num_tokens)


def _describable(tensor: Tensor) -> bool:
    row_bytes = tensor.shape[-1] * tensor.element_size()
    if row_bytes % swizzle_of(row_bytes):
        return False
    steps = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return tensor.numel() > 0 and all(stride * tensor.element_size() < _MAX_STRIDE_BYTES for stride in steps)


def _map_of(tensor: Tensor, num_tokens: int) -> TensorMap:
    row_bytes = tensor.shape[-1] * tensor.element_size()
    swizzle = swizzle_of(row_bytes)
    width = swizzle // tensor.element_size()
    columns = tensor.unflatten(-1, (row_bytes // swizzle, width)).permute(0, 2, 3, 1, 4)
    return tensor_map_of(columns, Box((1, 1, row_bytes // swizzle, num_tokens, width), swizzle, _PROMOTION))


def column_maps_of(kv: KVCache, num_tokens: int, width_bytes: int) -> tuple[TensorMap, TensorMap] | None:
    """The maps of K and V with dims page (ragged: one), KV head, token, element, and boxes of ``num_tokens`` of a head (of a page
    each, where pages have one), ``width_bytes`` wide and swizzled, of which the last may reach beyond the row; None for tensors
    that no map describes."""
    k, v = (tensor if kv.is_paged else tensor[None] for tensor in kv.as_nhd())
    if not (_describable(k) and _describable(v)):
        return None
    rows = (num_tokens, 1, 1) if kv.is_paged and k.shape[1] == 1 else (1, 1, num_tokens)
    box = Box((*rows, width_bytes // k.element_size()), width_bytes)
    # L2 must not fetch more than a row: what follows it may belong to another head, which another block reads much later.
    boxes = (
        box if tensor.shape[-1] * tensor.element_size() % 256 == 0 else box._replace(l2_promotion_bytes=128)
        for tensor in (k, v)
    )
    first, second = (tensor_map_of(tensor.transpose(1, 2), its) for tensor, its in zip((k, v), boxes, strict=True))
    return first, second
