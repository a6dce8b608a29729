"""sample: spec and binding of ``fi/kernels/sample.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from fi_core.sampling import NO_PENALTIES, DrawKeys, FilterParams, PenaltyParams
from torch import Tensor

from ...launch import LaunchableKernel
from ...params import ParamsLayout
from ...spec import kernel_for
from ..rows import vector_bytes
from .forms import PENALTY_FIELDS, FilteringSpec, address, kept_for, penalty_values
from .geometry import NO_SEARCH, NO_SEARCH_PENALISED, Geometry, geometry_for


@dataclass(frozen=True)
class SampleSpec(FilteringSpec):
    """Of rows of logits, each with its own parameters beside it."""

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
        )
    )

    def config_lines(self) -> list[str]:
        return [
            *super().config_lines(),
            "static constexpr bool kColumns = false, kTypicalP = false;",
        ]


@dataclass(frozen=True)
class ColumnSampleSpec(FilteringSpec):
    """Of rows whose parameters lie in columns; ``penalties``: which change the rows on their way in."""

    typical_p: bool
    penalties: bool

    stem: ClassVar = "sample"
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (*SampleSpec.layout.fields, ("typical_p", "pointer"), ("slots", "pointer"), *PENALTY_FIELDS)
    )

    @property
    def search(self) -> bool:
        return super().search or self.typical_p

    @property
    def penalised(self) -> bool:
        return self.penalties

    @property
    def bracket(self) -> bool:
        # With typical_p only if no other filter is there: two brackets and what serves the rest take 3 s to compile.
        return not (self.top_k or self.top_p or self.min_p) if self.typical_p else super().bracket

    def config_lines(self) -> list[str]:
        return [*super().config_lines(), "static constexpr bool kColumns = true, kDense = false;"]


@lru_cache(maxsize=1024)
def _bound(
    device: torch.device,
    dtype: torch.dtype,
    vector: int,
    geometry: Geometry,
    filters: frozenset[str],
) -> LaunchableKernel:
    return kernel_for(SampleSpec.of(dtype, vector, geometry, filters), device)


@lru_cache(maxsize=1024)
def _bound_to_columns(
    device: torch.device,
    dtype: torch.dtype,
    vector: int,
    geometry: Geometry,
    filters: frozenset[str],
    penalties: bool,
) -> LaunchableKernel:
    typical = "typical_p" in filters
    return kernel_for(ColumnSampleSpec.of(dtype, vector, geometry, filters, typical, penalties), device)


def _values(
    logits: Tensor, filters: FilterParams, keys: DrawKeys, rows: Tensor | None, tokens: Tensor
) -> tuple[int, ...]:
    """The values of SampleSpec's layout."""
    return (
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
        logits.shape[1],
        rows is not None and rows.dtype == torch.int64,
        filters.order == "joint",
    )


def sample(
    logits: Tensor,
    filters: FilterParams,
    keys: DrawKeys,
    rows: Tensor | None,
    tokens: Tensor,
    penalties: PenaltyParams = NO_PENALTIES,
    slots: Tensor | None = None,
) -> None:
    """The ``Sample`` protocol of fi-core, a cluster an output; its entry admits neither penalties nor slots."""
    device, vocab_size, num_outputs = logits.device, logits.shape[1], tokens.shape[0]
    form = geometry_for(vocab_size, num_outputs, kept=kept_for(filters.active))
    vector = vector_bytes(logits, multiple_of=vocab_size)
    kernel = _bound(device, logits.dtype, vector, form, filters.active)
    kernel.launch(device, num_outputs * form.cluster_size, 1, *_values(logits, filters, keys, rows, tokens))


def column_form(vocab_size: int, num_outputs: int, filters: frozenset[str], penalties: bool) -> Geometry:
    """The form of a row's cluster, with the shared memory of penalties."""
    kept = kept_for(filters)
    if penalties:
        kept = NO_SEARCH_PENALISED if kept is NO_SEARCH else kept.without_pairs()
    return geometry_for(vocab_size, num_outputs, kept=kept)


def sample_columns(
    logits: Tensor,
    filters: FilterParams,
    keys: DrawKeys,
    rows: Tensor | None,
    tokens: Tensor,
    penalties: PenaltyParams,
    slots: Tensor | None,
) -> None:
    """The ``Sample`` protocol of fi-core with all of its parts, a cluster an output."""
    device, vocab_size, num_outputs = logits.device, logits.shape[1], tokens.shape[0]
    form = column_form(vocab_size, num_outputs, filters.active, bool(penalties.active))
    vector = vector_bytes(logits, multiple_of=vocab_size)
    kernel = _bound_to_columns(device, logits.dtype, vector, form, filters.active, bool(penalties.active))
    kernel.launch(
        device,
        num_outputs * form.cluster_size,
        1,
        *_values(logits, filters, keys, rows, tokens),
        address(filters.typical_p),
        address(slots),
        *penalty_values(penalties),
    )
