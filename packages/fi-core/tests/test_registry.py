"""Plugins: discovery, validation, roll-back, and failures that stay with their plugin."""

import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator

import fi_core as fi
import pytest
import torch
from fi_core import registry as registry_module
from fi_core.contract import KernelEntry, OneOf, Operation, Target
from fi_core.hookspecs import BackendInfo, hookimpl
from fi_core.registry import KernelRegistry
from fi_core.settings import settings

TOY = Operation("toy", "a toy", {"dtype": "d"}, {"dtype": torch.float32}, lambda: iter(()))
CPU = Target("cpu")


def make_entry(backend: str, name: str = "kernel", **changes: object) -> KernelEntry:
    fields = {"op": "toy", "rules": {"dtype": OneOf(torch.float32)}, "load": lambda: name, "devices": ("cpu",)}
    return KernelEntry(name=name, backend=backend, **{**fields, **changes})


def make_plugin(backend: str, *entries: KernelEntry, priority: int = 1) -> types.SimpleNamespace:
    """A plugin object with the given kernels (default: one)."""
    kernels = entries or (make_entry(backend),)

    @hookimpl
    def fi_backend() -> BackendInfo:
        return BackendInfo(backend, "1.0", f"the {backend}", priority)

    @hookimpl
    def fi_register_kernels(registry: KernelRegistry) -> None:
        for entry in kernels:
            registry.add(entry)

    return types.SimpleNamespace(fi_backend=fi_backend, fi_register_kernels=fi_register_kernels)


@pytest.fixture
def current() -> KernelRegistry:
    return KernelRegistry([TOY])


def test_kernels_come_best_first(current: KernelRegistry) -> None:
    current.register_plugin(make_plugin("low", priority=1), "low")
    entries = (make_entry("high", "b"), make_entry("high", "a"), make_entry("high", "z", priority=5))
    current.register_plugin(make_plugin("high", *entries, priority=9), "high")
    assert [entry.full_name for entry in current.kernels("toy")] == ["high.z", "high.a", "high.b", "low.kernel"]
    assert current.kernels("other") == ()
    assert len(current.kernels()) == 4


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        (make_plugin("first"), "backend name 'first' is taken"),
        (make_plugin("second", make_entry("second"), make_entry("second")), "registered twice"),
        (make_plugin("second", make_entry("second"), make_entry("first", "x")), "kernels of another name"),
        (make_plugin("second", make_entry("second", rules={})), "rules missing"),
        (make_plugin("second", make_entry("second", op="nope")), "unknown operation 'nope'"),
        (make_plugin("second", make_entry("second", devices=())), "declares no device"),
    ],
)
def test_a_refused_plugin_leaves_nothing_behind(current: KernelRegistry, plugin: object, words: str) -> None:
    current.register_plugin(make_plugin("first"), "first")
    before = (current.kernels(), dict(current.backends), dict(current.operations))
    with pytest.raises(fi.PluginError, match=words):
        current.register_plugin(plugin, "culprit")
    assert (current.kernels(), current.backends, current.operations) == before
    assert not current.manager.is_registered(plugin)
    assert current.register_plugin(make_plugin("second"), "culprit") is not None


def test_a_plugin_that_raises_midway_leaves_nothing_behind(current: KernelRegistry) -> None:
    plugin = make_plugin("second")

    @hookimpl
    def fi_register_kernels(registry: KernelRegistry) -> None:
        registry.add(make_entry("second"))
        raise KeyError("table")

    plugin.fi_register_kernels = fi_register_kernels
    with pytest.raises(fi.PluginError, match=r"plugin 'culprit': KeyError: 'table'"):
        current.register_plugin(plugin, "culprit")
    assert current.kernels() == ()
    assert current.backends == {}
    assert not current.manager.is_registered(plugin)


def test_a_plugin_name_used_twice_is_refused(current: KernelRegistry) -> None:
    current.register_plugin(make_plugin("first"), "name")
    with pytest.raises(fi.PluginError, match="name"):
        current.register_plugin(make_plugin("second"), "name")
    assert set(current.backends) == {"first"}
    assert [entry.backend for entry in current.kernels()] == ["first"]


def test_the_same_plugin_twice_stays_registered_once(current: KernelRegistry) -> None:
    plugin = make_plugin("first")
    current.register_plugin(plugin, "first")
    with pytest.raises(fi.PluginError, match="registered already, as 'first'"):
        current.register_plugin(plugin, "again")
    assert current.manager.is_registered(plugin)
    assert set(current.backends) == {"first"}


def test_an_unknown_hook_is_refused(current: KernelRegistry) -> None:
    @hookimpl
    def fi_no_such_hook() -> None:
        return None

    with pytest.raises(fi.PluginError, match="fi_no_such_hook"):
        current.register_plugin(types.SimpleNamespace(fi_no_such_hook=fi_no_such_hook), "culprit")


def test_a_plugin_may_bring_an_operation(current: KernelRegistry) -> None:
    own = Operation("own", "own", {"n": "n"}, {"n": 1}, lambda: iter(()))

    @hookimpl
    def fi_backend() -> BackendInfo:
        return BackendInfo("owner", "1", "s", 1)

    @hookimpl
    def fi_register_kernels(registry: KernelRegistry) -> None:
        registry.add_operation(own)
        registry.add(make_entry("owner", op="own", rules={"n": OneOf(1)}))

    plugin = types.SimpleNamespace(fi_backend=fi_backend, fi_register_kernels=fi_register_kernels)
    current.register_plugin(plugin, "owner")
    assert current.select(own.request(CPU, n=1)).entry.full_name == "owner.kernel"
    with pytest.raises(fi.PluginError, match="already defined"):
        current.add_operation(own)


def test_loading_happens_once_and_its_failure_names_the_kernel(current: KernelRegistry) -> None:
    loads: list[int] = []
    good = make_entry("b", "good", load=lambda: loads.append(1) or "loaded")
    bad = make_entry("b", "bad", load=lambda: 1 / 0)
    assert [current.implementation(good) for _ in range(3)] == ["loaded"] * 3
    assert loads == [1]
    with pytest.raises(fi.PluginError, match=r"b\.bad failed to load: ZeroDivisionError"):
        current.implementation(bad)


class _Point:
    """A stand-in for an entry point."""

    def __init__(self, name: str, load: Callable[[], object], value: str | None = None) -> None:
        self.name, self.load, self.value, self.dist = name, load, value or f"{name}.module", None


@pytest.fixture
def discover(monkeypatch: pytest.MonkeyPatch, current: KernelRegistry) -> Iterator[Callable[..., KernelRegistry]]:
    def discover(*points: _Point) -> KernelRegistry:
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
        current.discover()
        return current

    yield discover
    monkeypatch.undo()
    settings.cache_clear()


def test_a_plugin_that_raises_at_import_is_reported_and_others_work(discover: Callable[..., KernelRegistry]) -> None:
    def broken() -> object:
        raise OSError("libfoo.so: cannot open")

    found = discover(
        _Point("a", broken), _Point("b", lambda: make_plugin("good")), _Point("c", lambda: make_plugin("good"))
    )
    first, second, third = found.statuses
    assert (first.info, first.error) == (None, "OSError: libfoo.so: cannot open")
    assert second.info is not None
    assert second.error is None
    assert "backend name 'good' is taken" in (third.error or "")
    assert found.select(TOY.request(CPU, dtype=torch.float32)).entry.full_name == "good.kernel"
    with pytest.raises(fi.UnknownBackendError, match=r"unknown backend 'a'.*good.*libfoo"):
        found.require_backend("a")


def test_one_module_under_two_paths_is_loaded_once(discover: Callable[..., KernelRegistry]) -> None:
    plugin = make_plugin("good")
    found = discover(_Point("good", lambda: plugin, "good.plugin"), _Point("good", lambda: plugin, "good.plugin"))
    assert len(found.statuses) == 1


def test_disabled_plugins_are_not_loaded(
    discover: Callable[..., KernelRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FI_DISABLE_PLUGINS", "bad")
    settings.cache_clear()

    def must_not_load() -> object:
        raise AssertionError("loaded")

    found = discover(_Point("bad", must_not_load), _Point("good", lambda: make_plugin("good")))
    assert [status.entry_point for status in found.statuses] == ["good"]


def test_the_installed_reference_serves_every_operation() -> None:
    installed = registry_module.registry()
    served = {entry.op for entry in installed.kernels() if entry.backend == "reference"}
    assert served == set(installed.operations)
    status = next(status for status in fi.backends() if status.entry_point == "reference")
    assert status.error is None
    assert status.info is not None
    assert status.info.priority == 0


def test_reset_discovers_again() -> None:
    before = registry_module.registry()
    registry_module.reset_registry()
    assert registry_module.registry() is not before
    assert set(registry_module.registry().operations) == set(before.operations)


def test_discovery_imports_no_kernel_module() -> None:
    assert "fi_core.reference.plugin" in sys.modules
    names = [entry for entry in registry_module.registry().kernels() if entry.backend == "reference"]
    assert all(callable(entry.load) for entry in names)
