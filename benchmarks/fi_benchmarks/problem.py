"""What a case is to the runner: inputs that all implementations share, our calls, the check and the ceilings."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from fi_core.contract import Cost
from torch import Tensor

from .numerics import Accuracy

Outputs = Mapping[str, Tensor]
Call = Callable[[], Outputs]
Maker = Callable[[], Call]
"""Makes a call with buffers of its own: inputs that the call overwrites are copied first."""


@dataclass(frozen=True)
class Problem:
    """A case on a device. ``request`` has the field values that choose our kernel, ``ours`` makes the call through the
    public function (its keys are variants, "" the plain one), ``check`` judges outputs, ``ceilings`` are calls that move
    the same bytes, ``inputs`` is what the peers read, ``repeats`` says how many calls one timing holds."""

    request: Mapping[str, Hashable]
    inputs: Any
    ours: Mapping[str, Maker]
    check: Callable[[Outputs], Accuracy]
    cost: Cost
    ceilings: Mapping[str, Maker] = field(default_factory=dict)
    repeats: int = 1


@dataclass(frozen=True)
class Case:
    """``op`` of the contract, the ``group`` whose table it stands in, its ``name``, and how it is made on a device."""

    op: str
    group: str
    name: str
    build: Callable[[torch.device], Problem]


def generator_on(device: torch.device, seed: int = 0) -> torch.Generator:
    """A seeded generator on ``device``: inputs are drawn where they are used."""
    return torch.Generator(device).manual_seed(seed)


def normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Standard normal values; FP8 dtypes are rounded from float16, a slice at a time."""
    if dtype.itemsize > 1:
        return torch.randn(shape, dtype=dtype, device=generator.device, generator=generator)
    out = torch.empty(shape, dtype=dtype, device=generator.device)
    for part in out.split(max(1, (1 << 27) // out[0].numel())):
        part.copy_(torch.randn(part.shape, dtype=torch.float16, device=generator.device, generator=generator))
    return out
