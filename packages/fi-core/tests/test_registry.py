"""Plugins: discovery, validation, roll-back, and failures that stay with their plugin."""

import importlib.metadata
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

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
RMSNORM_RULES = {"dtype": OneOf(torch.float32), "hidden_size": OneOf(8), "out_format": OneOf("same")}


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
    new = make_entry("high", "new", priority=-9)
    current.register_plugin(make_plugin("high", *entries, new, priority=9), "high")
    names = [entry.full_name for entry in current.kernels("toy")]
    assert names == ["high.z", "high.a", "high.b", "low.kernel", "high.new"]
    assert current.kernels("other") == ()
    assert len(current.kernels()) == 5


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


def _in_threads(function: Callable[[], object], count: int = 8) -> list[object]:
    barrier = threading.Barrier(count)

    def run(_: int) -> object:
        barrier.wait()
        return function()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_threads_share_one_registry_and_never_see_half_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found_within: list[KernelRegistry] = []

    def slow() -> object:
        time.sleep(0.05)
        found_within.append(registry_module.registry())
        return make_plugin("slow", make_entry("slow", op="rmsnorm", rules=RMSNORM_RULES))

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [_Point("slow", slow)])
    registry_module.reset_registry()
    try:
        found = _in_threads(lambda: (registry_module.registry(), tuple(registry_module.registry().backends)))
        assert len(set(map(str, found))) == 1
        assert found[0] == (found_within[0], ("slow",))
        assert len(found_within) == 1
    finally:
        monkeypatch.undo()
        registry_module.reset_registry()


def test_discovery_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(group: str) -> object:
        raise OSError("metadata")

    monkeypatch.setattr(importlib.metadata, "entry_points", broken)
    registry_module.reset_registry()
    with pytest.raises(OSError, match="metadata"):
        registry_module.registry()
    monkeypatch.undo()
    assert "reference" in registry_module.registry().backends


def test_threads_load_a_kernel_and_tell_observers_once(current: KernelRegistry) -> None:
    loads: list[int] = []
    seen: list[str] = []

    def load() -> str:
        time.sleep(0.02)
        loads.append(1)
        return "loaded"

    @hookimpl
    def fi_on_select(chosen: KernelEntry) -> None:
        time.sleep(0.02)
        seen.append(chosen.full_name)

    plugin = make_plugin("first", make_entry("first", load=load))
    plugin.fi_on_select = fi_on_select
    current.register_plugin(plugin, "first")
    request = TOY.request(CPU, dtype=torch.float32)
    assert set(_in_threads(lambda: current.implementation(current.select(request).entry))) == {"loaded"}
    assert (loads, seen) == ([1], ["first.kernel"])


def test_discovery_imports_no_kernel_module() -> None:
    assert "fi_core.reference.plugin" in sys.modules
    names = [entry for entry in registry_module.registry().kernels() if entry.backend == "reference"]
    assert all(callable(entry.load) for entry in names)
