"""Kernel entries of operations whose kernel is a function of the operation's name; importing this imports no Triton."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from fi_core.contract import KernelEntry, Rule

from .interpreter import kernel_devices, prepare_interpreter
from .names import BACKEND, MIN_CAPABILITY


def _loader(module: str, op: str) -> Callable[[], Any]:
    def load() -> Any:
        prepare_interpreter()
        return getattr(importlib.import_module(module), op)

    return load


def entries_of(rules: Mapping[str, Mapping[str, Rule]], modules: Mapping[str, str]) -> tuple[KernelEntry, ...]:
    """One entry for each operation of ``rules``; ``modules`` names the module of this package that holds it."""
    return tuple(
        KernelEntry(
            op, op, BACKEND, served, _loader(f"{__package__}.{modules[op]}", op), kernel_devices(), MIN_CAPABILITY
        )
        for op, served in rules.items()
    )
