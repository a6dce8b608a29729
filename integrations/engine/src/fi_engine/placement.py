"""Where an engine runs, and how much of the memory there its pages may take."""

from __future__ import annotations

import torch
from fi_core.errors import ArgumentError

from .config import EngineConfig
from .model import Model
from .runner import page_bytes

_CPU_CACHE_BYTES = 512 << 20


def device_of(given: str | torch.device | None) -> torch.device:
    """CUDA where there is one, else the CPU, unless ``given``; raises ArgumentError for a device that is not there."""
    if given is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = str(given).partition(":")
    present = {"cpu": 1, "cuda": torch.cuda.device_count()}
    if (index and not index.isdecimal()) or int(index or 0) >= present.get(kind, 0):
        known = ", ".join(["cpu", *(f"cuda:{number}" for number in range(present["cuda"]))])
        raise ArgumentError("device", f"one of {known}", given)
    return torch.device(given)


def default_pages(model: Model, config: EngineConfig, max_model_len: int) -> int:
    """Pages for ``max_batch`` requests of full length, within the memory that may be taken."""
    full = config.max_batch * -(-max_model_len // config.page_size)
    limit = _CPU_CACHE_BYTES
    if model.device.type == "cuda":
        limit = torch.cuda.mem_get_info(model.device)[0] // 2
    return max(1, min(full, limit // page_bytes(model, config.page_size)))
