"""Where the partition's C++ header lies, for backends that compile it for their device."""

from __future__ import annotations

from pathlib import Path


def include_folder() -> Path:
    """The folder below which ``fi/scheduler/partition.cuh`` is found."""
    return Path(__file__).resolve().parent.parent / "include"
