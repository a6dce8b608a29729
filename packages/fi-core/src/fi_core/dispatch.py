"""The hot path of functional operations: one dict lookup from (operation, device, field values) to a bound kernel."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from .contract import target_of
from .registry import KernelRegistry, Selection, forced_backend, registry


def select_for(op: str, device: torch.device | str, **values: Hashable) -> Selection:
    """The selection for an operation on a device; ``values`` are the operation's request fields."""
    current = registry()
    return current.select(current.operations[op].request(target_of(device), **values))


class Dispatcher:
    """Finds the implementation of one operation; ``fields`` fixes the order of the values in each call."""

    def __init__(self, op: str, *fields: str) -> None:
        self.op = op
        self.fields = fields
        self._bound: dict[tuple[Hashable, ...], Any] = {}
        self._owner: KernelRegistry | None = None
        self._generation = 0

    def __call__(self, device: torch.device, *values: Hashable) -> Any:
        """The kernel for these field values; raises UnsupportedError. Cached per registry, device and forced backend."""
        owner = registry()
        if owner is not self._owner or owner.generation != self._generation:
            self._bound, self._owner, self._generation = {}, owner, owner.generation
        key = (forced_backend(), device, *values)
        bound = self._bound.get(key)
        if bound is None:
            selection = select_for(self.op, device, **dict(zip(self.fields, values, strict=True)))
            bound = self._bound[key] = owner.implementation(selection.entry)
        return bound
