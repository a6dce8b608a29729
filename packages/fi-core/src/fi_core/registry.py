"""Plugins, operations and kernels: discovery through entry points, selection with recorded rejections."""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import pluggy

from . import hookspecs
from .contract import KernelEntry, Operation, Request, check_entry
from .errors import FiError, PluginError, UnknownBackendError, UnsupportedError
from .hookspecs import BackendInfo
from .settings import settings

ENTRY_POINT_GROUP = "fi"

_forced_backend: ContextVar[str | None] = ContextVar("fi_forced_backend", default=None)


@dataclass(frozen=True)
class PluginStatus:
    """What ``fi doctor`` prints of one entry point: loaded with ``info``, or not with ``error``."""

    entry_point: str
    distribution: str
    info: BackendInfo | None
    error: str | None


@dataclass(frozen=True)
class Selection:
    """The kernel chosen for a request, why, and every other kernel with its reasons."""

    request: Request
    entry: KernelEntry
    reason: str
    rejected: tuple[tuple[str, tuple[str, ...]], ...]

    def __str__(self) -> str:
        lines = [str(self.request), f"  chosen: {self.entry.full_name} ({self.reason})"]
        lines += [f"  rejected: {kernel}: {'; '.join(reasons)}" for kernel, reasons in self.rejected]
        return "\n".join(lines)


class KernelRegistry:
    """Operations and kernels; plugins receive it in ``fi_register_kernels``.

    Thread-safe: adding a plugin, selecting and loading a kernel exclude each other.
    """

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.manager = pluggy.PluginManager("fi")
        self.manager.add_hookspecs(hookspecs)
        self.operations: dict[str, Operation] = {item.name: item for item in operations}
        self.backends: dict[str, BackendInfo] = {}
        self.statuses: list[PluginStatus] = []
        self._entries: list[KernelEntry] = []
        self._loaded: dict[str, Any] = {}
        self._selections: dict[tuple[Request, str | None], Selection] = {}
        # Reentrant: a kernel's load() and a hook may select and load other kernels.
        self._lock = threading.RLock()
        self.generation = 0
        """Grows with every plugin added: choices made before may no longer hold."""

    def add_operation(self, operation: Operation) -> None:
        """Add an operation of a plugin's own; raises PluginError if the name is taken."""
        if operation.name in self.operations:
            raise PluginError(f"operation {operation.name!r} is already defined")
        self.operations[operation.name] = operation

    def add(self, entry: KernelEntry) -> None:
        """Add a kernel; raises PluginError for an incomplete declaration or a name used twice."""
        check_entry(entry, self.operations)
        if any(item.full_name == entry.full_name and item.op == entry.op for item in self._entries):
            raise PluginError(f"kernel {entry.full_name} is registered twice for {entry.op}")
        self._entries.append(entry)

    def kernels(self, op: str | None = None) -> tuple[KernelEntry, ...]:
        """All kernels (of one operation), best priority first."""
        chosen = [item for item in self._entries if op in (None, item.op)]
        return tuple(sorted(chosen, key=lambda item: (-self._priority(item), item.name)))

    def _priority(self, entry: KernelEntry) -> int:
        return self.backends[entry.backend].priority + entry.priority

    def register_plugin(self, plugin: object, name: str) -> BackendInfo | None:
        """Validate and add one plugin; on any error nothing of it stays registered and PluginError is raised.

        A plugin without ``fi_backend`` may implement other hooks only; None is returned for it.
        """
        with self._lock:
            if self.manager.is_registered(plugin):
                raise PluginError(f"plugin {name!r}: it is registered already, as {self.manager.get_name(plugin)!r}")
            before = (dict(self.operations), list(self._entries), dict(self.backends))
            try:
                self.manager.register(plugin, name)
                self.manager.check_pending()
                info = self._register_backend(plugin)
            except Exception as error:
                self._roll_back(plugin, before)
                raise PluginError(f"plugin {name!r}: {type(error).__name__}: {error}") from error
            self._selections.clear()
            self.generation += 1
            return info

    def _register_backend(self, plugin: object) -> BackendInfo | None:
        if not hasattr(plugin, "fi_backend"):
            return None
        info: BackendInfo = plugin.fi_backend()
        if info.name in self.backends:
            raise PluginError(f"backend name {info.name!r} is taken by another plugin")
        self.backends[info.name] = info
        if hasattr(plugin, "fi_register_kernels"):
            already = len(self._entries)
            plugin.fi_register_kernels(registry=self)
            foreign = [item.full_name for item in self._entries[already:] if item.backend != info.name]
            if foreign:
                raise PluginError(f"backend {info.name!r} registered kernels of another name: {foreign}")
        return info

    def _roll_back(
        self, plugin: object, before: tuple[dict[str, Operation], list[KernelEntry], dict[str, BackendInfo]]
    ) -> None:
        if self.manager.is_registered(plugin):
            self.manager.unregister(plugin)
        self.operations, self._entries, self.backends = before

    def discover(self) -> None:
        """Load every entry point of the group; a failure is recorded in ``statuses`` and never breaks the others."""
        seen: set[str] = set()
        for point in sorted(
            importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda item: (item.name, item.value)
        ):
            if point.value in seen or point.name in settings().disable_plugins:
                continue
            seen.add(point.value)
            distribution = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
            info, error = None, None
            try:
                info = self.register_plugin(point.load(), point.name)
            except Exception as failure:  # noqa: BLE001 - a foreign module may raise anything at import
                error = f"{type(failure).__name__}: {failure}"
            self.statuses.append(PluginStatus(point.name, distribution, info, error))

    def implementation(self, entry: KernelEntry) -> Any:
        """The loaded implementation of ``entry``; loading happens once, its failure raises PluginError."""
        key = f"{entry.op}:{entry.full_name}"
        with self._lock:
            if key not in self._loaded:
                try:
                    self._loaded[key] = entry.load()
                except FiError:
                    raise
                except Exception as error:
                    raise PluginError(
                        f"kernel {entry.full_name} failed to load: {type(error).__name__}: {error}"
                    ) from error
            return self._loaded[key]

    def select(self, request: Request, backend: str | None = None) -> Selection:
        """Choose the kernel for ``request``; ``backend`` (or ``use``, or FI_BACKEND) admits that backend alone.

        Raises UnknownBackendError, or UnsupportedError holding every kernel's reasons.
        """
        key = (request, forced_backend() if backend is None else backend)
        with self._lock:
            found = self._selections.get(key)
            if found is None:
                found = self._selections[key] = self._choose(*key)
            return found

    def _choose(self, request: Request, forced: str | None) -> Selection:
        if forced is not None:
            self.require_backend(forced)
        accepted: list[KernelEntry] = []
        rejected: list[tuple[str, tuple[str, ...]]] = []
        for entry in self.kernels(request.op):
            reasons = entry.reject(request)
            if forced is not None and entry.backend != forced:
                reasons.insert(0, f"backend {forced!r} was asked for")
            if reasons:
                rejected.append((entry.full_name, tuple(reasons)))
            else:
                accepted.append(entry)
        if not accepted:
            raise UnsupportedError(request, rejected)
        override = self._ask("fi_select_kernel", request=request, candidates=tuple(accepted))
        chosen = accepted[0] if override is None else override
        if chosen not in accepted:
            raise PluginError(f"fi_select_kernel chose {chosen.full_name}, which does not serve {request}")
        reason = self._reason(chosen, forced, override is not None)
        passed_over = [
            (item.full_name, (f"serves it, but {chosen.full_name} was preferred",))
            for item in accepted
            if item is not chosen
        ]
        selection = Selection(request, chosen, reason, tuple(passed_over + rejected))
        self._ask("fi_on_select", request=request, chosen=chosen, rejected=selection.rejected)
        return selection

    def _ask(self, hook: str, **arguments: Any) -> Any:
        """Call a hook; what a plugin raises becomes a PluginError that names the hook."""
        try:
            return getattr(self.manager.hook, hook)(**arguments)
        except FiError:
            raise
        except Exception as error:
            raise PluginError(f"a {hook} hook raised {type(error).__name__}: {error}") from error

    def _reason(self, chosen: KernelEntry, forced: str | None, overridden: bool) -> str:
        if overridden:
            return "chosen by a fi_select_kernel hook"
        if forced is not None:
            return f"backend {forced!r} was asked for"
        return f"highest priority, {self._priority(chosen)}, of the kernels that serve it"

    def require_backend(self, name: str) -> BackendInfo:
        """The backend of that name; UnknownBackendError names those installed and those that failed to load."""
        if name in self.backends:
            return self.backends[name]
        failed = [f"{item.entry_point} ({item.error})" for item in self.statuses if item.error]
        text = f"unknown backend {name!r}; loaded: {sorted(self.backends)}"
        raise UnknownBackendError(text + (f"; failed to load: {', '.join(failed)}" if failed else ""))


_registry: KernelRegistry | None = None
_discovering: KernelRegistry | None = None
_discovery = threading.RLock()


def registry() -> KernelRegistry:
    """The process's registry; the first call discovers and loads the installed plugins, while other threads wait (a
    plugin that calls it meanwhile gets the registry as it is by then)."""
    return _registry or _discover()


def _discover() -> KernelRegistry:
    global _registry, _discovering
    with _discovery:
        found = _registry or _discovering
        if found is None:
            from .ops import OPERATIONS

            found = _discovering = KernelRegistry(OPERATIONS)
            try:
                found.discover()
                _registry = found
            finally:
                _discovering = None
        return found


def reset_registry() -> None:
    """Forget all plugins and selections; the next use discovers them again (for tests)."""
    global _registry
    _registry = None


@contextmanager
def use(*, backend: str) -> Iterator[None]:
    """Within the block (this thread or task) only ``backend`` is a candidate; raises UnknownBackendError at once."""
    registry().require_backend(backend)
    token = _forced_backend.set(backend)
    try:
        yield
    finally:
        _forced_backend.reset(token)


def forced_backend() -> str | None:
    """The backend that ``use`` or FI_BACKEND asks for, part of every cached choice's key."""
    return _forced_backend.get() or settings().backend
