"""Names of devices."""

from __future__ import annotations

import torch


def normal_device(device: torch.device | str) -> torch.device:
    """``device`` with its index filled in: what a tensor made there reports."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
