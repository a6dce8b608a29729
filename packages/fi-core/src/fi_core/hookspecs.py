"""Hooks that fi-core calls. They choose and observe; none is called per launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from .contract import KernelEntry, Request, Target
    from .registry import KernelRegistry

hookspec = pluggy.HookspecMarker("fi")
hookimpl = pluggy.HookimplMarker("fi")


@dataclass(frozen=True)
class BackendInfo:
    """Who a plugin is. ``name`` is unique among installed plugins; higher ``priority`` wins selection."""

    name: str
    version: str
    summary: str
    priority: int


@hookspec
def fi_backend() -> BackendInfo:
    """Name the backend. Called once, by the registry, when the plugin is loaded; must not touch a GPU."""
    raise AssertionError  # pragma: no cover - pluggy never calls a specification


@hookspec
def fi_register_kernels(registry: KernelRegistry) -> None:
    """Add kernels (and own operations) to ``registry``. Called once after ``fi_backend``; must not touch a GPU or
    import a compiler: a KernelEntry's ``load`` does that when the kernel is first chosen."""


@hookspec(firstresult=True)
def fi_select_kernel(request: Request, candidates: Sequence[KernelEntry]) -> KernelEntry | None:
    """Override the choice among ``candidates`` (all serve the request, best first). Called once per distinct request;
    None leaves the choice to the next plugin and at last to the priorities."""


@hookspec(firstresult=True)
def fi_tuning(op: str, target: Target) -> Mapping[str, Any] | None:
    """Tuning parameters of a kernel family for a target. Called by backends at plan time; None: the built-in table."""


@hookspec
def fi_doctor() -> list[str]:
    """Lines on the state of a plugin's own parts (native modules, caches, compilers) for ``fi doctor``, which calls it
    once a run; without it, or for an empty list, only the plugin's name and version are shown."""
    raise AssertionError  # pragma: no cover - pluggy never calls a specification


@hookspec
def fi_on_select(request: Request, chosen: KernelEntry, rejected: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Observe a selection: once per distinct request, with every rejected kernel and its reasons."""
