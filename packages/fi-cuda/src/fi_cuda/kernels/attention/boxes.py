"""Which K and V the copy engine can bring to the decode kernel, and their tensor maps (``fi/attention/load_boxes.cuh``)."""

from __future__ import annotations

from fi_core.records import KVCache
from torch import Tensor

from ...params import TensorMap
from ...tensor_map import Box, tensor_map_of
from .tuning import swizzle_of

_PATTERN_TOKENS = 8
_MAX_STRIDE_BYTES = 2**40


def tokens_of_box(page_size: int | None, chunk_tokens: int) -> int | None:
    """Tokens that a box holds: a chunk's, or those of a page where it is smaller; None where pages and chunks do not fit
    into each other, or a box would not begin where the swizzle's pattern does."""
    size = chunk_tokens if page_size is None else page_size
    fits = size % chunk_tokens == 0 or chunk_tokens % size == 0
    tokens = min(size, chunk_tokens)
    return tokens if fits and tokens % _PATTERN_TOKENS == 0 else None


def maps_of(kv: KVCache, num_tokens: int, swizzle: int | None = None) -> tuple[TensorMap, TensorMap] | None:
    """The maps of K and V with dims page (ragged: one), KV head, token, element, and boxes of ``num_tokens`` of a head and
    as wide as the swizzle (None: the widest that fills rows); None for tensors that no map describes."""
    k, v = (_heads_first(tensor, kv.is_paged) for tensor in kv.as_nhd())
    if not (_describable(k) and _describable(v)):
        return None
    return _map_of(k, num_tokens, swizzle), _map_of(v, num_tokens, swizzle)


def _heads_first(tensor: Tensor, paged: bool) -> Tensor:
    return (tensor if paged else tensor[None]).transpose(1, 2)


def _describable(tensor: Tensor) -> bool:
    steps = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return tensor.numel() > 0 and all(stride * tensor.element_size() < _MAX_STRIDE_BYTES for stride in steps)


def _map_of(tensor: Tensor, num_tokens: int, swizzle: int | None) -> TensorMap:
    row_bytes = tensor.shape[-1] * tensor.element_size()
    swizzle = swizzle or swizzle_of(row_bytes)
    # L2 must not fetch more than a row: what follows it may belong to another head, which another block reads much later.
    promotion = 256 if row_bytes % 256 == 0 else 128
    return tensor_map_of(tensor, Box((1, 1, num_tokens, swizzle // tensor.element_size()), swizzle, promotion))
