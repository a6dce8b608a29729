"""Checks of KV caches and of the memory layout that every tensor of heads obeys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError, LayoutError
from ..records import KVCache


def check_strides(name: str, tensor: Tensor) -> None:
    """Raise LayoutError unless the last dim is contiguous and rows start at multiples of 16 bytes, so that kernels may
    read 16 bytes at a time. Strides of dims of size 1 do not matter."""
    strides = tensor.stride()
    size = tensor.element_size()
    together = 0
    for stride in strides[:-1]:
        together |= stride
    if not (together * size | tensor.data_ptr()) & 15 and strides[-1] == 1:
        return
    aligned = tensor.data_ptr() % 16 == 0
    for extent, stride in zip(tensor.shape[:-1], strides, strict=False):
        if extent > 1 and stride * size % 16:
            aligned = False
    if not aligned or (strides[-1] != 1 and tensor.shape[-1] > 1):
        expected = "a contiguous last dim, other strides and the address multiples of 16 bytes"
        raise LayoutError(name, expected, f"strides {strides} of {size} bytes at {tensor.data_ptr() % 16} mod 16")


def check_cache(kv: KVCache, num_heads: int, head_dim: int, head_dim_vo: int, device: torch.device) -> None:
    """Raise ArgumentError unless K, V and their scales have these heads and dims, agree, and are on ``device``, and
    LayoutError for strides that no kernel reads."""
    nhd = kv.layout == "NHD"
    for name, tensor, dim in (("k", kv.k, head_dim), ("v", kv.v, head_dim_vo)):
        heads, tokens = (tensor.shape[-2], tensor.shape[-3]) if nhd else (tensor.shape[-3], tensor.shape[-2])
        if heads != num_heads or tensor.shape[-1] != dim:
            expected = f"{num_heads} heads of {dim} ({kv.layout})"
            raise ArgumentError(f"kv.{name}", expected, f"{heads} heads of {tensor.shape[-1]}")
        like_k = (kv.k.shape[0] if kv.is_paged else None, kv.k.shape[-3] if nhd else kv.k.shape[-2])
        if (tensor.shape[0] if kv.is_paged else None, tokens) != like_k:
            raise ArgumentError(f"kv.{name}", f"pages and tokens like kv.k, {list(kv.k.shape)}", list(tensor.shape))
        if tensor.device != device:
            raise ArgumentError(f"kv.{name}", f"a tensor on {device}", tensor.device)
        check_strides(f"kv.{name}", tensor)
        scale = kv.k_scale if name == "k" else kv.v_scale
        if isinstance(scale, Tensor):
            shape, wanted = tuple(scale.shape), ((), (1,), (num_heads,))
            if (
                scale.dtype != torch.float32
                or shape not in wanted
                or scale.device != device
                or not scale.is_contiguous()
            ):
                actual = f"{scale.dtype} {list(shape)} on {scale.device}"
                raise ArgumentError(f"kv.{name}_scale", f"float32 [] or [{num_heads}] on {device}", actual)
