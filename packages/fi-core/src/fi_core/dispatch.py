"""The hot path of functional operations: one dict lookup from (operation, device, field values) to a bound kernel."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from .contract import target_of
from .registry import KernelRegistry, Selection, forced_backend, registry
from .settings import settings


def select_for(op: str, device: torch.device | str, **values: Hashable) -> Selection:
    """The selection for an operation on a device; ``values`` are the operation's request fields."""
    current = registry()
    return current.select(current.operations[op].request(target_of(device), **values))


class Dispatcher:
    """Finds the implementation of one operation; ``fields`` fixes the order of the values in each call."""

    def __init__(self, op: str, *fields: str) -> None:
        self.op = op
        self.fields = fields
        # Replaced as a whole: what a thread found under an older registry never ends up among newer choices.
        self._bound: tuple[KernelRegistry | None, int, dict[tuple[Hashable, ...], Any]] = (None, 0, {})

    def __call__(self, device: torch.device, *values: Hashable) -> Any:
        """The kernel for these field values; raises UnsupportedError. Cached per registry, device and forced backend."""
        current = registry()
        owner, generation, bound = self._bound
        if owner is not current or generation != current.generation:
            bound = {}
            self._bound = (current, current.generation, bound)
        key = (forced_backend(), device, *values)
        kernel = bound.get(key)
        if kernel is None:
            selection = select_for(self.op, device, **dict(zip(self.fields, values, strict=True)))
            kernel = current.implementation(selection.entry)
            if settings().shadow > 0:
                from .shadow import shadowed

                kernel = shadowed(self.op, kernel)
            bound[key] = kernel
        return kernel
