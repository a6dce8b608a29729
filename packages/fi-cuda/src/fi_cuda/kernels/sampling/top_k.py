"""top_k and logprobs: spec and bindings of ``fi/kernels/top_k.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from fi_core.sampling import LogprobsOut
from torch import Tensor

from ...launch import LaunchableKernel
from ...params import ParamsLayout
from ...spec import kernel_for
from ..rows import power_of_2_at_least, vector_bytes
from .forms import ClusterRowSpec, address
from .geometry import Geometry, geometry_for

SORTED_IN_ROW = 512
"""Most tokens that are sorted in memory that the kernel has anyway, as fi/sampling/first_k.cuh has it."""


@dataclass(frozen=True)
class TopKSpec(ClusterRowSpec):
    """``sorted``: room for so many tokens to sort, a power of 2; 0 for k up to SORTED_IN_ROW. ``logprobs``: log-probabilities
    instead of logits, and one of a chosen token."""

    sorted: int
    logprobs: bool

    stem: ClassVar = "top_k"
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (
            ("logits", "pointer"),
            ("tokens", "pointer"),
            ("values", "output"),
            ("indices", "output"),
            ("chosen", "output"),
            ("logits_stride", "int64"),
            ("vocab_size", "int32"),
            ("k", "int32"),
        )
    )

    @property
    def groups(self) -> bool:
        return True

    @property
    def shared_bytes(self) -> int:
        return -(-super().shared_bytes // 16) * 16 + 8 * self.sorted


@lru_cache(maxsize=1024)
def _bound(
    device: torch.device, dtype: torch.dtype, vector: int, geometry: Geometry, sorted_tokens: int, logprobs: bool
) -> LaunchableKernel:
    return kernel_for(TopKSpec(dtype, vector, *geometry, sorted_tokens, logprobs), device)


def _launch(logits: Tensor, tokens: Tensor | None, values: Tensor, indices: Tensor, chosen: Tensor | None) -> None:
    device, (num_rows, vocab_size) = logits.device, logits.shape
    k = values.shape[1]
    form = geometry_for(vocab_size, num_rows)
    sorted_tokens = 0 if k <= SORTED_IN_ROW else power_of_2_at_least(k)
    vector = vector_bytes(logits, multiple_of=vocab_size)
    _bound(device, logits.dtype, vector, form, sorted_tokens, chosen is not None).launch(
        device,
        num_rows * form.cluster_size,
        1,
        logits.data_ptr(),
        address(tokens),
        values.data_ptr(),
        indices.data_ptr(),
        address(chosen),
        logits.stride(0),
        vocab_size,
        k,
    )


def top_k(logits: Tensor, values: Tensor, indices: Tensor) -> None:
    """The ``TopK`` protocol of fi-core, k up to what the kernel's entry declares."""
    _launch(logits, None, values, indices, None)


def logprobs(logits: Tensor, tokens: Tensor, out: LogprobsOut) -> None:
    """The ``Logprobs`` protocol of fi-core, top_n likewise."""
    _launch(logits, tokens, out.values, out.indices, out.chosen)
