"""What hot paths remember about a record: found by identity, forgotten with the record."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

Value = TypeVar("Value")

_MAX_REMEMBERED = 4096


class Remembered(Generic[Value]):
    """A value for each of some frozen records, such as that it passed a check: true as long as the record lives.

    Values must not refer to the record or its tensors, which would then never be freed.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[object], Value]] = {}

    def get(self, record: object) -> Value | None:
        """The value put for this very record, None without one."""
        found = self._found.get(id(record))
        # An id names another record once the first is gone; the weak reference tells.
        return found[1] if found is not None and found[0]() is record else None

    def put(self, record: object, value: Value) -> None:
        """Remember ``value`` (not None) until ``record`` goes or too many are remembered."""
        if len(self._found) >= _MAX_REMEMBERED:
            self._found.clear()
        self._found[id(record)] = (weakref.ref(record), value)
