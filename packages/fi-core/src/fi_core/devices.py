"""Names of devices."""

from __future__ import annotations

import torch

from .errors import ArgumentError


def normal_device(device: torch.device | str) -> torch.device:
    """``device`` with its index filled in: what a tensor made there reports. ArgumentError unless this machine has it."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError("device", "a torch device, such as 'cpu' or 'cuda:0'", repr(device)) from error
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ArgumentError("device", f"one of this machine's {count} CUDA devices", device)
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
