"""Conformance cases, one module an operation, and the tools they share.

Poison discipline: every output is filled with NaN (floats) or a sentinel (integers) before a kernel runs, so what it
fails to write cannot pass; outputs and inputs are views into larger poisoned buffers where the layout allows it, and
the rest of the buffer is returned for a bit-exact comparison, so what it writes too much cannot pass either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SENTINEL = -77
"""What poisoned signed integers hold (uint8: 0xA5)."""


def name_of(dtype: torch.dtype) -> str:
    """The short name of a dtype in case names."""
    names = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    return names[dtype]


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor full of NaN, or of SENTINEL (0xA5 for uint8, True for bool)."""
    if dtype.is_floating_point:
        return torch.full(tuple(shape), float("nan"), dtype=torch.float32, device=device).to(dtype)
    value = {torch.uint8: 0xA5, torch.bool: 1}.get(dtype, SENTINEL)
    return torch.full(tuple(shape), value, dtype=dtype, device=device)


def normal(shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Standard normal values, drawn on the CPU in float32 so that they are the same on every device."""
    return torch.randn(tuple(shape), generator=generator).to(device=device, dtype=dtype)


@dataclass(frozen=True)
class Guarded:
    """``view`` inside the larger ``base``, which is poison everywhere else."""

    base: Tensor
    view: Tensor

    def rest(self) -> Tensor:
        """A copy of ``base`` with the view's elements zeroed: what must still be poison."""
        copy = self.base.clone()
        copy.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).zero_()
        return copy


def guarded(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    before: int = 0,
    after: int = 0,
    content: Tensor | None = None,
) -> Guarded:
    """A view of ``shape`` with ``before`` and ``after`` poisoned elements around each innermost row, and one poisoned
    row before and after all; filled with ``content`` if given, else poison too."""
    *leading, last = shape
    width = before + last + after
    rows = torch.Size(leading).numel()
    base = poisoned((rows + 2, width), dtype, device)
    view = base[1 : rows + 1].view(*leading, width)[..., before : before + last]
    if content is not None:
        view.copy_(content)
    return Guarded(base, view)
