"""A step's inputs in one pinned block of memory, so that they reach the device in a single copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT_BYTES = 16


class StepBlock:
    """Named columns of fixed capacity: numpy views to fill on the host, tensors to read on the device.

    Addresses never change, so captured graphs may read them. On a CPU both are the same memory and ``push`` does nothing.
    """

    def __init__(self, columns: Mapping[str, tuple[torch.dtype, int]], device: torch.device) -> None:
        offsets, total = {}, 0
        for name, (dtype, size) in columns.items():
            offsets[name] = total
            total += -(-size * dtype.itemsize // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        on_device = device.type != "cpu"
        self._host = torch.zeros(total, dtype=torch.uint8, pin_memory=on_device)
        self._device = torch.zeros(total, dtype=torch.uint8, device=device) if on_device else self._host
        self._copied = torch.cuda.Event() if on_device else None
        self.host: dict[str, np.ndarray[Any, Any]] = {}
        self.device: dict[str, Tensor] = {}
        for name, (dtype, size) in columns.items():
            span = slice(offsets[name], offsets[name] + size * dtype.itemsize)
            self.host[name] = self._host[span].view(dtype).numpy()
            self.device[name] = self._device[span].view(dtype)

    def wait(self) -> None:
        """Return once the last copy has read the host side, which may then be written."""
        if self._copied is not None:
            self._copied.synchronize()

    def push(self) -> None:
        """Copy the whole block to the device in stream order; call ``wait`` before the host side is written again."""
        if self._copied is not None:
            self._device.copy_(self._host, non_blocking=True)
            self._copied.record(torch.cuda.current_stream(self._device.device))
