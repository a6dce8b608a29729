"""copy_pages: spec and binding of ``fi/kernels/copy_pages.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from fi_core.records import KVCache
from torch import Tensor

from ..launch import LaunchableKernel
from ..params import ParamsLayout
from ..spec import KernelSpec, kernel_for

_THREADS = 128
_PACKS_PER_THREAD = 2
_MANY_BLOCKS = 1024


@dataclass(frozen=True)
class CopyPagesSpec(KernelSpec):
    """One width of loads and stores and one dtype of page ids; formats and layouts are strides to it. ``flat``: a page of K
    and one of V are contiguous in both caches; ``streaming``: what is written leaves L2 first, since it is too much to stay."""

    index: torch.dtype
    vector_bytes: int
    flat: bool
    streaming: bool

    stem: ClassVar = "copy_pages"
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (
            ("source_k", "pointer"),
            ("source_v", "pointer"),
            ("source_pages", "pointer"),
            ("target_pages", "pointer"),
            ("target_k", "output"),
            ("target_v", "output"),
            ("source_k_strides", "rows"),
            ("source_v_strides", "rows"),
            ("target_k_strides", "rows"),
            ("target_v_strides", "rows"),
            ("source_k_page_stride", "int64"),
            ("source_v_page_stride", "int64"),
            ("target_k_page_stride", "int64"),
            ("target_v_page_stride", "int64"),
            ("k_packs", "int32"),
            ("v_packs", "int32"),
            ("k_width", "int32"),
            ("v_width", "int32"),
            ("k_inner", "int32"),
            ("v_inner", "int32"),
        )
    )

    @property
    def num_threads(self) -> int:
        return _THREADS

    def config_lines(self) -> list[str]:
        return [*super().config_lines(), f"static constexpr int kPacksPerThread = {_PACKS_PER_THREAD};"]


class PageForm(NamedTuple):
    """A page of K or V in two caches as rows of contiguous elements: row r begins at r // inner of the outer and
    r % inner of the inner stride, (outer, inner) in ``source`` and ``target``."""

    num_rows: int
    width: int
    inner: int
    source: tuple[int, int]
    target: tuple[int, int]


@lru_cache(maxsize=1024)
def page_form(shape: tuple[int, int, int], source: tuple[int, int], target: tuple[int, int]) -> PageForm:
    """The fewest rows of a page of ``shape`` (outer, inner, width) whose dims before the last have these strides."""
    outer, inner, width = shape
    num_rows = outer * inner
    if inner == 1 or source[1] == target[1] == width:
        num_rows, width, inner = outer, inner * width, 1
        source, target = (source[0], 0), (target[0], 0)
        if outer == 1 or source[0] == target[0] == width:
            num_rows, width = 1, outer * width
            source = target = (0, 0)
    return PageForm(num_rows, width, inner, source, target)


class _Launch(NamedTuple):
    """What a launch takes besides page ids and addresses: ``values`` follow those in the struct."""

    vector: int
    flat: bool
    num_blocks: int
    values: tuple[int, ...]


@lru_cache(maxsize=1024)
def _launch(size: int, alignment: int, shapes: tuple[torch.Size, torch.Size], *strides: tuple[int, ...]) -> _Launch:
    """The launch for elements of ``size`` bytes, addresses aligned to ``alignment``, ``shapes`` of K and V, and the strides
    of the source's K and V and the target's."""
    source_k, source_v, target_k, target_v = strides
    bits = alignment | (shapes[0][3] | shapes[1][3]) * size
    for stride in (stride for tensor in strides for stride in tensor[:-1]):
        bits |= stride * size
    vector = bits & -bits
    unit = vector // size
    k, v = (
        page_form((shape[1], shape[2], shape[3]), (source[1], source[2]), (target[1], target[2]))
        for shape, source, target in zip(shapes, (source_k, source_v), (target_k, target_v), strict=True)
    )
    k_packs, v_packs = (form.num_rows * form.width // unit for form in (k, v))
    in_elements = (*k.source, *v.source, *k.target, *v.target, *(tensor[0] for tensor in strides))
    widths = (k.width // unit, v.width // unit, k.inner, v.inner)
    values = (*(stride // unit for stride in in_elements), k_packs, v_packs, *widths)
    flat = k.num_rows == v.num_rows == 1
    return _Launch(vector, flat, -(-(k_packs + v_packs) // (_THREADS * _PACKS_PER_THREAD)), values)


@lru_cache(maxsize=64)
def _bound(device: torch.device, index: torch.dtype, vector: int, flat: bool, streaming: bool) -> LaunchableKernel:
    return kernel_for(CopyPagesSpec(index, vector, flat, streaming), device)


def copy_pages(source: KVCache, target: KVCache, source_pages: Tensor, target_pages: Tensor) -> None:
    """The ``CopyPages`` protocol of fi-core: K and V in one launch."""
    device, source_k, source_v, target_k, target_v = source_pages.device, source.k, source.v, target.k, target.v
    source_at, target_at = (source_k.data_ptr(), source_v.data_ptr()), (target_k.data_ptr(), target_v.data_ptr())
    bits = 16 | source_at[0] | source_at[1] | target_at[0] | target_at[1]
    strides = (source_k.stride(), source_v.stride(), target_k.stride(), target_v.stride())
    launch = _launch(source_k.element_size(), bits & -bits, (source_k.shape, source_v.shape), *strides)
    num_pairs = source_pages.shape[0]
    streaming = num_pairs * launch.num_blocks >= _MANY_BLOCKS
    _bound(device, source_pages.dtype, launch.vector, launch.flat, streaming).launch(
        device,
        num_pairs,
        launch.num_blocks,
        *source_at,
        source_pages.data_ptr(),
        target_pages.data_ptr(),
        *target_at,
        *launch.values,
    )
