"""What a workload is, and the sizes it has on each kind of device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract import Cost, Tolerance

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Scale:
    """Sizes of the workloads on a kind of device."""

    dtype: torch.dtype
    num_tokens: int
    num_requests: int
    kv_len: int
    prompt_len: int
    hidden_size: int
    width: int
    num_rows: int
    vocab_size: int


SCALES = {
    "cuda": Scale(torch.bfloat16, 4096, 64, 4096, 2048, 4096, 14336, 64, 128256),
    "cpu": Scale(torch.float32, 128, 4, 256, 128, 1024, 2816, 4, 32000),
}


@dataclass(frozen=True)
class Workload:
    """One call made ready: ``values`` are its request's field values, ``call`` runs it and returns its outputs, judged
    by ``tolerance`` against the reference's on equal inputs."""

    case: str
    values: Mapping[str, Hashable]
    call: Callable[[], Outputs]
    cost: Cost
    tolerance: Mapping[str, Tolerance]


Builder = Callable[[torch.device, Scale], Workload]
"""Makes a workload on a device; equal inputs every time."""
