"""Copy whole pages between paged KV caches or within one: the contract and the public function.

Copy on write of shared pages (Kwon et al., 2023, section 4.4), defragmentation, and swapping to pinned host memory and back
(section 4.5).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import library
from ..contract import Case, Cost, Operation
from ..dispatch import Dispatcher
from ..errors import ArgumentError
from ..records import KVCache
from ..remembered import Remembered
from ..settings import settings
from .arguments import call_checked, check_writable


def _cases() -> Iterator[Case]:
    from .cases.copy_pages import cases

    return cases()


OPERATION = Operation(
    name="copy_pages",
    summary="copy pages of K and V between paged caches, within one, or to and from pinned host memory",
    fields={
        "kv_format": "storage format of both caches",
        "head_dim": "width of a K head",
        "head_dim_vo": "width of a V head",
        "page_size": "tokens a page",
        "kv_layout": "'NHD' or 'HND'",
        "placement": "'device' (both caches on one device), or pinned host memory: 'from_host', 'to_host'",
    },
    typical={
        "kv_format": "bf16",
        "head_dim": 128,
        "head_dim_vo": 128,
        "page_size": 16,
        "kv_layout": "NHD",
        "placement": "device",
    },
    cases=_cases,
)

_dispatch = Dispatcher("copy_pages", "kv_format", "head_dim", "head_dim_vo", "page_size", "kv_layout", "placement")


def copy_pages(source: KVCache, target: KVCache, source_pages: Tensor, target_pages: Tensor) -> None:
    """Copy page ``source_pages[i]`` of ``source`` to page ``target_pages[i]`` of ``target``, K and V, bit for bit.

    Both caches are paged and agree in layout, format, page size, heads and dims; how many pages they have and their
    strides may differ (last dims contiguous), and so may their scales, which are not copied: numbers that differ are an
    error, tensors the caller keeps equal. ``source`` and ``target`` may be one cache. They are on one device, or one of
    them is in pinned host memory and the other on a CUDA device, whose kernels then read or write the host's memory.

    ``source_pages`` and ``target_pages`` are int64 or int32 [N], contiguous, on the CUDA device if there is one; a pair
    with an id below 0 is skipped. The pairs are copied in no particular order: no page may be the target of two pairs,
    and within one cache the source of a pair must not be the target of another (a page may be copied to itself).
    Checked mode finds ids that are out of range and pairs that break this rule; else their result is undefined.
    Chains of copies take a call for each link. Stream-ordered, no synchronisation: before the host touches pinned
    memory that takes part, it waits for the stream. Raises ArgumentError.
    """
    device = _check_devices(source, target)
    compiling = torch.compiler.is_compiling()
    known = None if compiling else _checked_sources.get(target)
    if known is None or known() is not source:
        _check_shapes(source, target)
    _check_pages("source_pages", source_pages, source_pages, device)
    _check_pages("target_pages", target_pages, source_pages, device)
    if compiling:
        layout, kv_format, *scales = library.cache_details(source)
        details = (layout, kv_format, *scales, *library.cache_details(target)[2:])
        _OP(source.k, source.v, target.k, target.v, *details, source_pages, target_pages)
        return
    if known is None or known() is not source:
        check_writable("target.k", target.k)
        check_writable("target.v", target.v)
        _checked_sources.put(target, weakref.ref(source))
    if settings().check:
        _check_indices(source, target, source_pages, target_pages)
    placement = "device" if source.k.device == target.k.device else "to_host" if source.k.is_cuda else "from_host"
    dims = (source.k.shape[3], source.v.shape[3])
    kernel = _dispatch(device, source.format, *dims, source.page_size, source.layout, placement)
    arguments = (source, target, source_pages, target_pages)
    call_checked(kernel, arguments, lambda: _check_indices(*arguments))


# The source that a target was last checked with; weak, for source and target may be one cache.
_checked_sources: Remembered[weakref.ref[KVCache]] = Remembered()


def _check_indices(source: KVCache, target: KVCache, source_pages: Tensor, target_pages: Tensor) -> None:
    from .. import checks

    checks.check_copy(source, target, source_pages, target_pages)


def _check_devices(source: KVCache, target: KVCache) -> torch.device:
    """The device that copies: the caches' own, or the CUDA device when one of them is in pinned host memory."""
    for name, kv in (("source", source), ("target", target)):
        if kv.v.device != kv.k.device:
            raise ArgumentError(f"{name}.v", f"a tensor on {kv.k.device} like {name}.k", kv.v.device)
    if source.k.device == target.k.device:
        return target.k.device
    if {source.k.device.type, target.k.device.type} != {"cpu", "cuda"}:
        raise ArgumentError("target", f"a cache on {source.k.device}, or one of the two on the CPU", target.k.device)
    name, host, device = ("source", source, target) if target.k.is_cuda else ("target", target, source)
    if not torch.compiler.is_compiling():
        for part, tensor in (("k", host.k), ("v", host.v)):
            if not tensor.is_pinned():
                raise ArgumentError(f"{name}.{part}", f"pinned memory beside a cache on {device.k.device}", "pageable")
    return device.k.device


def _check_shapes(source: KVCache, target: KVCache) -> None:
    for name, kv in (("source", source), ("target", target)):
        if not kv.is_paged:
            raise ArgumentError(name, "a paged cache", f"k of shape {list(kv.k.shape)}")
        if kv.v.shape[:3] != kv.k.shape[:3]:
            raise ArgumentError(f"{name}.v", f"{[*kv.k.shape[:3], 'Dv']} like k", list(kv.v.shape))
    for name in ("layout", "format", "page_size", "num_kv_heads"):
        expected, actual = getattr(source, name), getattr(target, name)
        if actual != expected:
            raise ArgumentError(f"target.{name}", f"{expected!r} like the source", actual)
    for name in ("k", "v"):
        expected, actual = getattr(source, name).shape[3], getattr(target, name).shape[3]
        if actual != expected:
            raise ArgumentError(f"target.{name}", f"heads of {expected} like source.{name}", f"heads of {actual}")
        scales = [getattr(kv, f"{name}_scale") for kv in (source, target)]
        if not any(isinstance(scale, Tensor) for scale in scales):
            expected, actual = (1.0 if scale is None else scale for scale in scales)
            if actual != expected:
                raise ArgumentError(f"target.{name}_scale", f"{expected} like the source", actual)


def _check_pages(name: str, pages: Tensor, model: Tensor, device: torch.device) -> None:
    if pages.dtype not in (torch.int64, torch.int32) or pages.dim() != 1 or pages.device != device:
        expected = f"int64 or int32 [N] on {device}"
        raise ArgumentError(name, expected, f"{pages.dtype} {list(pages.shape)} on {pages.device}")
    if pages.dtype != model.dtype or pages.shape != model.shape:
        expected = f"{model.dtype} {list(model.shape)} like source_pages"
        raise ArgumentError(name, expected, f"{pages.dtype} {list(pages.shape)}")
    if not pages.is_contiguous():
        raise ArgumentError(name, "a contiguous tensor", f"strides {pages.stride()}")


def _run_flat(*flat: Any) -> None:
    """The operator's arguments, in the order of its schema."""
    source_k, source_v, target_k, target_v, layout, kv_format, *scales, source_pages, target_pages = flat
    source = library.cache_of(source_k, source_v, layout, kv_format, *scales[:2])
    target = library.cache_of(target_k, target_v, layout, kv_format, *scales[2:])
    copy_pages(source, target, source_pages, target_pages)


_OP = library.register(
    "copy_pages(Tensor source_k, Tensor source_v, Tensor(a!) target_k, Tensor(b!) target_v, str layout, str kv_format, "
    "Tensor?[] source_scales, float[] source_scale_values, Tensor?[] target_scales, float[] target_scale_values, "
    "Tensor source_pages, Tensor target_pages) -> ()",
    _run_flat,
)


def copy_pages_cost(kv: KVCache, num_pages: int) -> Cost:
    """Fewest bytes (each page of K and V read and written once); no FLOPs."""
    elements = kv.k.shape[1:].numel() + kv.v.shape[1:].numel()
    return Cost(2 * num_pages * elements * kv.k.element_size(), 0)
