"""The ceilings' own kernels: a copy and a page-table read with bulk copies (Hopper), compiled by fi_cuda."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from fi_cuda.params import ParamsLayout
from fi_cuda.spec import KernelSpec, kernel_for
from torch import Tensor

_FOLDERS = (Path(__file__).parent / "include", *KernelSpec.include_folders)
_LARGEST_PIECE = 2048
"""Bytes of a bulk copy of the page reader: 32 lanes issue them, and three stages of them fill its ring."""


@dataclass(frozen=True)
class StreamPagesSpec(KernelSpec):
    """``fi/kernels/stream_pages.cuh``: a ring of ``ring_bytes`` a block in at most ``max_stages``."""

    ring_bytes: int = 192 * 1024
    max_stages: int = 24

    stem: ClassVar = "stream_pages"
    include_folders: ClassVar = _FOLDERS
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (
            ("k", "pointer"),
            ("v", "pointer"),
            ("pages", "pointer"),
            ("valid_bytes", "pointer"),
            ("num_pages", "int64"),
            ("page_bytes", "int32"),
            ("piece_bytes", "int32"),
        )
    )

    @property
    def num_threads(self) -> int:
        return 32

    @property
    def shared_bytes(self) -> int:
        return self.ring_bytes


@dataclass(frozen=True)
class BulkCopySpec(KernelSpec):
    """``fi/kernels/bulk_copy.cuh``: a ring of ``stages`` times ``stage_bytes`` a block."""

    stages: int = 8
    stage_bytes: int = 16384

    stem: ClassVar = "bulk_copy"
    include_folders: ClassVar = _FOLDERS
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (("source", "pointer"), ("target", "output"), ("num_bytes", "int64"), ("piece_bytes", "int32"))
    )

    @property
    def num_threads(self) -> int:
        return 32

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.stage_bytes


SPECS = (StreamPagesSpec(), BulkCopySpec())


@lru_cache(maxsize=8)
def _num_blocks(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def piece_bytes_of(page_bytes: int) -> int:
    """Bytes of a piece of a page: the largest divisor up to that of a power of two; a multiple of 16."""
    piece = math.gcd(page_bytes, _LARGEST_PIECE)
    if piece % 16:
        raise ValueError(f"pages of {page_bytes} bytes are no multiple of 16 bytes")
    return piece


def stream_pages(k: Tensor, v: Tensor, page_bytes: int, pages: Tensor, valid_bytes: Tensor) -> None:
    """Read pages of ``page_bytes`` of k and v (both contiguous) into shared memory: of each of ``pages`` int32 [N] the
    first ``valid_bytes`` int32 [N] (multiples of 16)."""
    kernel_for(StreamPagesSpec(), k.device).launch(
        k.device,
        _num_blocks(k.device),
        1,
        k.data_ptr(),
        v.data_ptr(),
        pages.data_ptr(),
        valid_bytes.data_ptr(),
        pages.shape[0],
        page_bytes,
        piece_bytes_of(page_bytes),
    )


def copy_piece_bytes(num_bytes: int, num_blocks: int, stage_bytes: int) -> int:
    """Bytes of a piece of a copy: small enough that every block has one, large enough to be worth a bulk copy."""
    share = -(-num_bytes // num_blocks)
    return min(stage_bytes, max(1024, -(-share // 16) * 16))


def bulk_copy(source: Tensor, target: Tensor) -> None:
    """Copy contiguous ``source`` to ``target``; the bytes are a multiple of 16."""
    spec, num_bytes = BulkCopySpec(), source.numel() * source.element_size()
    blocks = _num_blocks(source.device)
    piece = copy_piece_bytes(num_bytes, blocks, spec.stage_bytes)
    kernel_for(spec, source.device).launch(
        source.device, blocks, 1, source.data_ptr(), target.data_ptr(), num_bytes, piece
    )
