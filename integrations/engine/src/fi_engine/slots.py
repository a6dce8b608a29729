"""Which request of an engine holds which slot."""

from __future__ import annotations


class SlotHolders:
    """The slots of an engine. A slot is a place for what the device must know of a request: losing it costs a
    request nothing but writing it anew, so slots of requests that sit a step out are taken when none is free."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots))[::-1]
        self.slot_of: dict[int, int] = {}
        self.pages: dict[int, tuple[int, ...]] = {}

    def release(self, request_id: int) -> int | None:
        """Free the request's slot; returns it, or None if it holds none."""
        slot = self.slot_of.pop(request_id, None)
        if slot is not None:
            self.pages.pop(slot, None)
            self._free.append(slot)
        return slot

    @property
    def next_free(self) -> int:
        """The slot that ``take`` gives next; there must be one."""
        return self._free[-1]

    def take(self, request_id: int) -> None:
        self.slot_of[request_id] = self._free.pop()

    @property
    def num_free(self) -> int:
        return len(self._free)
