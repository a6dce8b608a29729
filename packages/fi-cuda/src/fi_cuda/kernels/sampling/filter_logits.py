"""filter_logits: spec and binding of ``fi/kernels/filter_logits.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from fi_core.sampling import FilterParams
from torch import Tensor

from ...launch import LaunchableKernel
from ...params import ParamsLayout
from ...spec import kernel_for
from ..rows import vector_bytes
from .forms import FilteringSpec, address, kept_for
from .geometry import Geometry, geometry_for


@dataclass(frozen=True)
class FilterLogitsSpec(FilteringSpec):
    """``probs``: renormalised probabilities, else masked logits."""

    out_vector_bytes: int
    probs: bool

    stem: ClassVar = "filter_logits"
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (
            ("logits", "pointer"),
            ("temperature", "pointer"),
            ("top_k", "pointer"),
            ("top_p", "pointer"),
            ("min_p", "pointer"),
            ("out", "output"),
            ("logits_stride", "int64"),
            ("out_stride", "int64"),
            ("vocab_size", "int32"),
            ("joint", "int32"),
        )
    )

    def config_lines(self) -> list[str]:
        return [*super().config_lines(), "static constexpr bool kTypicalP = false;"]


@lru_cache(maxsize=1024)
def _bound(
    device: torch.device,
    dtype: torch.dtype,
    vectors: tuple[int, int],
    geometry: Geometry,
    filters: frozenset[str],
    probs: bool,
) -> LaunchableKernel:
    spec = FilterLogitsSpec.of(dtype, vectors[0], geometry, filters, vectors[1], probs)
    return kernel_for(spec, device)


def filter_logits(logits: Tensor, filters: FilterParams, kind: str, out: Tensor) -> None:
    """The ``FilterLogits`` protocol of fi-core, a cluster a row; ``out`` may be the logits."""
    device, (num_rows, vocab_size) = logits.device, logits.shape
    chosen = geometry_for(vocab_size, num_rows, kept=kept_for(filters.active).without_pairs())
    vectors = (vector_bytes(logits, multiple_of=vocab_size), vector_bytes(out, multiple_of=vocab_size))
    kernel = _bound(device, logits.dtype, vectors, chosen, filters.active, kind == "probs")
    kernel.launch(
        device,
        num_rows * chosen.cluster_size,
        1,
        logits.data_ptr(),
        address(filters.temperature),
        address(filters.top_k),
        address(filters.top_p),
        address(filters.min_p),
        out.data_ptr(),
        logits.stride(0),
        out.stride(0),
        vocab_size,
        filters.order == "joint",
    )
