"""penalize_logits: spec and binding of ``fi/kernels/penalize_logits.cuh``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from fi_core.sampling import PenaltyParams
from torch import Tensor

from ...launch import LaunchableKernel
from ...params import ParamsLayout
from ...spec import KernelSpec, kernel_for
from ..rows import vector_bytes
from .forms import PENALTY_FIELDS, address, penalty_values, stride

_THREADS = 256
_WARP_TOKENS = 1024
"""A block takes 8192 tokens, 32 KB: six blocks share a multiprocessor."""


@dataclass(frozen=True)
class PenalizeLogitsSpec(KernelSpec):
    """``parts``: blocks a row; ``dense``: the tokens of prompt and output are dense counts."""

    dtype: torch.dtype
    vector_bytes: int
    warp_tokens: int
    parts: int
    dense: bool

    stem: ClassVar = "penalize_logits"
    overlapping: ClassVar = True
    contracts: ClassVar = False
    layout: ClassVar = ParamsLayout(
        (
            ("logits", "pointer"),
            ("out", "output"),
            ("slots", "pointer"),
            ("prompt_counts", "pointer"),
            ("output_counts", "pointer"),
            ("logits_stride", "int64"),
            ("out_stride", "int64"),
            ("prompt_stride", "int64"),
            ("output_stride", "int64"),
            ("vocab_size", "int32"),
            *PENALTY_FIELDS,
        )
    )

    @classmethod
    def of(cls, dtype: torch.dtype, vector: int, vocab_size: int, dense: bool) -> PenalizeLogitsSpec:
        """The spec for rows of ``vocab_size``, as few tokens a warp as hold a small one."""
        warps = _THREADS // 32
        warp_tokens = min(_WARP_TOKENS, -(-vocab_size // (128 * warps)) * 128)
        return cls(dtype, vector, warp_tokens, -(-vocab_size // (warp_tokens * warps)), dense)

    @property
    def num_threads(self) -> int:
        return _THREADS

    @property
    def shared_bytes(self) -> int:
        return 4 * _THREADS // 32 * self.warp_tokens

    def config_lines(self) -> list[str]:
        derived = (
            f"static constexpr int kSharedBytes = {self.shared_bytes};",
            "static constexpr int kResidentBlocks = 2;",
            "static constexpr bool kWeighed = false;",  # places past the vocabulary hold NaN and stay so
            "static constexpr bool kSmallest = false;",
        )
        return [*super().config_lines(), *derived]


@lru_cache(maxsize=1024)
def _bound(
    device: torch.device, dtype: torch.dtype, vector: int, vocab_size: int, dense: bool
) -> tuple[LaunchableKernel, int]:
    """The kernel, and its blocks a row."""
    spec = PenalizeLogitsSpec.of(dtype, vector, vocab_size, dense)
    return kernel_for(spec, device), spec.parts


def penalize_logits(logits: Tensor, penalties: PenaltyParams, out: Tensor, slots: Tensor | None = None) -> None:
    """The ``PenalizeLogits`` protocol of fi-core: float32 arithmetic, rounded once; ``out`` may be the logits."""
    device, (num_rows, vocab_size) = logits.device, logits.shape
    vector = vector_bytes(logits, out, multiple_of=vocab_size)
    kernel, parts = _bound(device, logits.dtype, vector, vocab_size, penalties.counts == "dense")
    kernel.launch(
        device,
        num_rows * parts,
        1,
        logits.data_ptr(),
        out.data_ptr(),
        address(slots),
        address(penalties.prompt_counts),
        address(penalties.output_counts),
        logits.stride(0),
        out.stride(0),
        stride(penalties.prompt_counts),
        stride(penalties.output_counts),
        vocab_size,
        *penalty_values(penalties),
    )
