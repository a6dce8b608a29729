"""Workspaces of plans: typed regions of one buffer, laid out from capacities alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ALIGNMENT = 256


@dataclass(frozen=True)
class Region:
    """A typed part of a buffer, ``begin`` bytes from its start."""

    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return self.begin + size

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """This region of ``buffer`` (uint8), as a view."""
        return buffer[self.begin : self.end].view(self.dtype).view(self.shape)


class RegionBuilder:
    """Places regions one after another, each at a multiple of 256 bytes; ``end`` is the size of the buffer so far."""

    def __init__(self) -> None:
        self.end = 0

    def add(self, shape: tuple[int, ...], dtype: torch.dtype) -> Region:
        region = Region(self.end, shape, dtype)
        self.end = -(-region.end // _ALIGNMENT) * _ALIGNMENT
        return region
