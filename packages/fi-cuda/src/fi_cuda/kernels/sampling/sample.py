"""sample: spec and binding of ``fi/kernels/sample.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from fi_core.sampling import DrawKeys, FilterParams
from torch import Tensor

from ...launch import LaunchableKernel
from ...params import ParamsLayout
from ...spec import kernel_for
from ..rows import vector_bytes
from .forms import FilteringSpec, address, searches
from .geometry import Geometry, geometry_for, start_delay
from .tuning import SamplingTuning, sampling_tuning_for


@dataclass(frozen=True)
class SampleSpec(FilteringSpec):
    """Of rows of logits."""

    stem: ClassVar = "sample"
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (
            ("logits", "pointer"),
            ("rows", "pointer"),
            ("temperature", "pointer"),
            ("top_k", "pointer"),
            ("top_p", "pointer"),
            ("min_p", "pointer"),
            ("seed", "pointer"),
            ("sample", "pointer"),
            ("position", "pointer"),
            ("tokens", "output"),
            ("logits_stride", "int64"),
            ("vocab_size", "int32"),
            ("wide_rows", "int32"),
            ("joint", "int32"),
            ("layer", "int32"),
            ("delay", "int32"),
        )
    )


@lru_cache(maxsize=1024)
def _bound(
    device: torch.device,
    dtype: torch.dtype,
    vector: int,
    geometry: Geometry,
    filters: frozenset[str],
    tuning: SamplingTuning,
) -> LaunchableKernel:
    return kernel_for(SampleSpec.of(dtype, vector, geometry, filters, tuning=tuning), device)


def sample(logits: Tensor, filters: FilterParams, keys: DrawKeys, rows: Tensor | None, tokens: Tensor) -> None:
    """The ``Sample`` protocol of fi-core, a cluster an output."""
    device, vocab_size, num_outputs = logits.device, logits.shape[1], tokens.shape[0]
    tuning = sampling_tuning_for(device)
    chosen = geometry_for(vocab_size, num_outputs, search=searches(filters.active), tuning=tuning)
    vector = vector_bytes(logits, multiple_of=vocab_size)
    kernel = _bound(device, logits.dtype, vector, chosen, filters.active, tuning)
    kernel.launch(
        device,
        num_outputs * chosen.cluster_size,
        1,
        logits.data_ptr(),
        address(rows),
        address(filters.temperature),
        address(filters.top_k),
        address(filters.top_p),
        address(filters.min_p),
        keys.seed.data_ptr(),
        keys.sample.data_ptr(),
        keys.position.data_ptr(),
        tokens.data_ptr(),
        logits.stride(0),
        vocab_size,
        rows is not None and rows.dtype == torch.int64,
        filters.order == "joint",
        *start_delay(chosen, num_outputs, logits.element_size()),
    )
