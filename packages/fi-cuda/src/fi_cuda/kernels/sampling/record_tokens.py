"""record_tokens: spec and binding of ``fi/kernels/record_tokens.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from fi_core.sampling import TokenHistory
from torch import Tensor

from ...launch import LaunchableKernel
from ...params import ParamsLayout
from ...spec import KernelSpec, kernel_for
from .forms import address


@dataclass(frozen=True)
class RecordTokensSpec(KernelSpec):
    """One form for every history."""

    stem: ClassVar = "record_tokens"
    overlapping: ClassVar = True
    layout: ClassVar = ParamsLayout(
        (
            ("tokens", "pointer"),
            ("slots", "pointer"),
            ("seen", "output"),
            ("entries", "output"),
            ("num_entries", "output"),
            ("num_output", "output"),
            ("tokens_stride", "int64"),
            ("seen_stride", "int64"),
            ("entry_stride", "int64"),
            ("num_tokens", "int32"),
            ("seen_words", "int32"),
            ("capacity", "int32"),
        )
    )

    @property
    def num_threads(self) -> int:
        return 256


@lru_cache(maxsize=64)
def _bound(device: torch.device) -> LaunchableKernel:
    return kernel_for(RecordTokensSpec(), device)


def record_tokens(history: TokenHistory, tokens: Tensor, slots: Tensor | None) -> None:
    """The ``RecordTokens`` protocol of fi-core, a block a row."""
    device = tokens.device
    _bound(device).launch(
        device,
        tokens.shape[0],
        1,
        tokens.data_ptr(),
        address(slots),
        *(tensor.data_ptr() for tensor in history.tensors),
        tokens.stride(0),
        history.seen.stride(0),
        history.entries.stride(0),
        tokens.shape[1],
        history.seen.shape[1],
        history.entries.shape[1],
    )
