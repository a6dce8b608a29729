"""Scheduling policies: the order in which requests are served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from fi_core.errors import ArgumentError

from .hookspecs import hookimpl

if TYPE_CHECKING:
    from .requests import Request


class SchedulingPolicy(Protocol):
    """A total order over requests."""

    def key(self, request: Request) -> tuple[int, ...]:
        """Sort key: the smallest is served first and preempted last. Distinct for distinct requests and constant."""


class FifoPolicy:
    """First come, first served; priorities count for nothing."""

    def key(self, request: Request) -> tuple[int, ...]:
        return (request.arrival,)


class PriorityPolicy:
    """Higher ``priority`` first, then first come, first served."""

    def key(self, request: Request) -> tuple[int, ...]:
        return (-request.priority, request.arrival)


class BuiltinPolicies:
    """Plugin with the built-in policies "fifo" and "priority"; neither takes settings."""

    @hookimpl
    def fi_scheduling_policy(self, name: str, config: Mapping[str, Any]) -> SchedulingPolicy | None:
        if name in ("fifo", "priority") and config:
            raise ArgumentError("policy_config", f"no settings for {name!r}", sorted(config))
        if name == "fifo":
            return FifoPolicy()
        return PriorityPolicy() if name == "priority" else None
