"""Remembers which kernel was chosen for each request to the registry, for the table at the end of a demo."""

from __future__ import annotations

from collections.abc import Sequence

from fi_core.contract import KernelEntry, Request
from fi_core.hookspecs import hookimpl
from fi_core.registry import Selection, registry


class KernelLog:
    """An observing plugin; selections made before it was started are not in it."""

    def __init__(self) -> None:
        self._requests: dict[Request, None] = {}

    def start(self) -> None:
        """Register with the process's registry."""
        registry().register_plugin(self, f"fi-engine-kernel-log-{id(self)}")

    @hookimpl
    def fi_on_select(
        self, request: Request, chosen: KernelEntry, rejected: Sequence[tuple[str, Sequence[str]]]
    ) -> None:
        self._requests[request] = None

    def selections(self) -> list[Selection]:
        """All selections so far, by operation."""
        return [registry().select(request) for request in sorted(self._requests, key=lambda item: item.op)]
