"""What the specs of kernels on a cluster's row share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...spec import KernelSpec
from .geometry import Geometry

_RANK_BINS, _LIST_ENTRIES = 512, 640  # as fi/sampling/cluster_row.cuh has them


@dataclass(frozen=True)
class ClusterRowSpec(KernelSpec):
    """One element type, width of loads and form of a row's cluster (``Geometry``)."""

    dtype: torch.dtype
    vector_bytes: int
    cluster_blocks: int
    block_threads: int
    warp_tokens: int

    @property
    def cluster_size(self) -> int:
        return self.cluster_blocks

    @property
    def num_threads(self) -> int:
        return self.block_threads

    @property
    def shared_bytes(self) -> int:
        warps = self.block_threads // 32
        exchanged = self.cluster_blocks * (16 * warps + 16 + 8 + 8) + warps * (8 + 8 + 8)
        slice_bytes = Geometry(self.cluster_blocks, self.block_threads, self.warp_tokens).slice_bytes
        return slice_bytes + 8 * _LIST_ENTRIES + 8 * _RANK_BINS + exchanged + 64

    def config_lines(self) -> list[str]:
        return [*super().config_lines(), f"static constexpr int kSharedBytes = {self.shared_bytes};"]


def address(tensor: Tensor | None) -> int:
    """Where a column begins; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
