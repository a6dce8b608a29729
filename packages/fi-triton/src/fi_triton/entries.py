"""Kernel entries of operations whose kernel is a function of the operation's name; importing this imports no Triton."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from fi_core.contract import Condition, KernelEntry, Request, Rule

from .interpreter import kernel_devices, prepare_interpreter
from .names import BACKEND, FP8_CAPABILITY, MIN_CAPABILITY


def _loader(module: str, op: str) -> Callable[[], Any]:
    def load() -> Any:
        prepare_interpreter()
        return getattr(importlib.import_module(module), op)

    return load


def converts_fp8(request: Request) -> bool:
    """Whether the target's hardware converts to and from FP8; the interpreter does."""
    capability = request.target.capability
    return capability is None or capability >= FP8_CAPABILITY


def entries_of(
    rules: Mapping[str, Mapping[str, Rule]],
    modules: Mapping[str, str],
    conditions: Mapping[str, tuple[Condition, ...]] | None = None,
) -> tuple[KernelEntry, ...]:
    """One entry for each operation of ``rules``; ``modules`` names the module of this package that holds it,
    ``conditions`` the limits of some that involve several fields."""
    return tuple(
        KernelEntry(
            op,
            op,
            BACKEND,
            served,
            _loader(f"{__package__}.{modules[op]}", op),
            kernel_devices(),
            MIN_CAPABILITY,
            (conditions or {}).get(op, ()),
        )
        for op, served in rules.items()
    )
