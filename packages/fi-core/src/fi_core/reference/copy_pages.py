"""Reference of ``copy_pages``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..records import KVCache

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def bits_view(tensor: Tensor) -> Tensor:
    """``tensor`` as integers of its element size: copying them keeps every bit, also of a NaN."""
    return tensor.view(_BITS[tensor.element_size()])


def copy_pages(source: KVCache, target: KVCache, source_pages: Tensor, target_pages: Tensor) -> None:
    """The ``CopyPages`` protocol; all pages are read before one is written. Synchronises on a GPU."""
    kept = (source_pages >= 0) & (target_pages >= 0)
    sources, targets = source_pages[kept].long(), target_pages[kept].long()
    for read, written in ((source.k, target.k), (source.v, target.v)):
        pages = bits_view(read)[sources.to(read.device)]
        bits_view(written)[targets.to(written.device)] = pages.to(written.device)
