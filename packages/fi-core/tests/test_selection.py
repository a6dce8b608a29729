"""Selection: priorities, forcing a backend, hooks, recorded rejections and the caches."""

import threading
import types
from collections.abc import Iterator, Sequence

import fi_core as fi
import pytest
import torch
from fi_core.contract import Between, KernelEntry, OneOf, Operation, Request, Target
from fi_core.dispatch import Dispatcher, select_for
from fi_core.hookspecs import BackendInfo, hookimpl
from fi_core.registry import KernelRegistry, forced_backend, registry
from fi_core.settings import settings

TOY = Operation("toy", "a toy", {"size": "s"}, {"size": 4}, lambda: iter(()))
CPU = Target("cpu")


def _plugin(backend: str, priority: int, rule: object, **hooks: object) -> types.SimpleNamespace:
    @hookimpl
    def fi_backend() -> BackendInfo:
        return BackendInfo(backend, "1.0", "s", priority)

    @hookimpl
    def fi_register_kernels(registry: KernelRegistry) -> None:
        registry.add(KernelEntry("toy", "k", backend, {"size": rule}, lambda: backend, ("cpu",)))

    marked = {name: hookimpl(function) for name, function in hooks.items()}
    return types.SimpleNamespace(fi_backend=fi_backend, fi_register_kernels=fi_register_kernels, **marked)


@pytest.fixture
def current() -> KernelRegistry:
    made = KernelRegistry([TOY])
    made.register_plugin(_plugin("fast", 100, Between(4, 8)), "fast")
    made.register_plugin(_plugin("middle", 50, OneOf(1)), "middle")
    made.register_plugin(_plugin("slow", 0, Between(1)), "slow")
    return made


def _request(size: int = 4) -> Request:
    return TOY.request(CPU, size=size)


def test_highest_priority_that_serves_wins_and_all_others_are_recorded(current: KernelRegistry) -> None:
    selection = current.select(_request(4))
    assert selection.entry.full_name == "fast.k"
    assert dict(selection.rejected) == {
        "slow.k": ("serves it, but fast.k was preferred",),
        "middle.k": ("size: 4 is not one of 1",),
    }
    assert "100" in selection.reason
    assert str(selection).splitlines()[0] == "toy(size=4) on cpu"
    assert "rejected: middle.k: size: 4 is not one of 1" in str(selection)
    assert current.select(_request(9)).entry.full_name == "slow.k"


def test_unsupported_holds_every_reason(current: KernelRegistry) -> None:
    with pytest.raises(fi.UnsupportedError) as caught:
        current.select(_request(0))
    assert [kernel for kernel, _ in caught.value.rejections] == ["fast.k", "middle.k", "slow.k"]
    for text in (
        "no kernel supports toy(size=0) on cpu",
        "fast.k: size: 0 is not 4 to 8",
        "slow.k: size: 0 is not 1 or more",
    ):
        assert text in str(caught.value)
    with pytest.raises(fi.UnsupportedError, match="device: cuda is not one of cpu"):
        current.select(TOY.request(Target("cuda", (9, 0)), size=4))
    with pytest.raises(fi.UnsupportedError, match="no backend registered a kernel"):
        KernelRegistry([TOY]).select(_request())


def test_a_forced_backend_is_the_only_candidate(current: KernelRegistry) -> None:
    selection = current.select(_request(4), backend="slow")
    assert selection.entry.full_name == "slow.k"
    assert dict(selection.rejected)["fast.k"] == ("backend 'slow' was asked for",)
    with pytest.raises(fi.UnsupportedError, match="backend 'middle' was asked for"):
        current.select(_request(4), backend="middle")
    with pytest.raises(fi.UnknownBackendError, match="nope"):
        current.select(_request(4), backend="nope")
    with pytest.raises(fi.UnknownBackendError, match="unknown backend ''"):
        current.select(_request(4), backend="")
    assert current.select(_request(4)).entry.full_name == "fast.k"


def test_fi_backend_forces_too(current: KernelRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_BACKEND", "slow")
    settings.cache_clear()
    try:
        assert current.select(_request(4)).entry.full_name == "slow.k"
        assert current.select(_request(4), backend="fast").entry.full_name == "fast.k"
        assert forced_backend() == "slow"
    finally:
        monkeypatch.undo()
        settings.cache_clear()
    assert current.select(_request(4)).entry.full_name == "fast.k"


def test_a_hook_overrides_the_choice(current: KernelRegistry) -> None:
    seen: list[Sequence[KernelEntry]] = []

    def fi_select_kernel(request: Request, candidates: Sequence[KernelEntry]) -> KernelEntry | None:
        seen.append(candidates)
        return candidates[-1] if request["size"] == 5 else None

    current.register_plugin(types.SimpleNamespace(fi_select_kernel=hookimpl(fi_select_kernel)), "chooser")
    assert current.select(_request(5)).entry.full_name == "slow.k"
    assert "hook" in current.select(_request(5)).reason
    assert current.select(_request(4)).entry.full_name == "fast.k"
    assert [[entry.full_name for entry in candidates] for candidates in seen] == [["fast.k", "slow.k"]] * 2


def test_a_hook_may_not_choose_what_does_not_serve(current: KernelRegistry) -> None:
    unfit = next(entry for entry in current.kernels("toy") if entry.backend == "middle")
    hook = hookimpl(lambda request, candidates: unfit)
    hook.__name__ = "fi_select_kernel"
    current.register_plugin(types.SimpleNamespace(fi_select_kernel=hook), "chooser")
    with pytest.raises(fi.PluginError, match=r"middle\.k, which does not serve"):
        current.select(_request(4))


def test_observers_see_each_distinct_request_once(current: KernelRegistry) -> None:
    seen: list[tuple[Request, str, int]] = []

    def fi_on_select(request: Request, chosen: KernelEntry, rejected: Sequence[object]) -> None:
        seen.append((request, chosen.full_name, len(rejected)))

    current.register_plugin(types.SimpleNamespace(fi_on_select=hookimpl(fi_on_select)), "observer")
    for size in (4, 4, 9, 4):
        current.select(_request(size))
    assert seen == [(_request(4), "fast.k", 2), (_request(9), "slow.k", 2)]


@pytest.mark.parametrize("name", ["fi_select_kernel", "fi_on_select"])
def test_a_hook_that_raises_is_named(current: KernelRegistry, name: str) -> None:
    def hook(request: Request) -> None:
        raise ValueError("broken")

    current.register_plugin(types.SimpleNamespace(**{name: hookimpl(hook)}), "culprit")
    with pytest.raises(fi.PluginError, match=f"{name} hook raised ValueError: broken"):
        current.select(_request(4))


def test_a_new_plugin_invalidates_cached_selections(current: KernelRegistry) -> None:
    first = current.select(_request(4))
    assert current.select(_request(4)) is first
    current.register_plugin(_plugin("faster", 200, Between(1)), "faster")
    assert current.select(_request(4)).entry.full_name == "faster.k"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, current: KernelRegistry) -> Iterator[KernelRegistry]:
    """``current`` in the place of the process's registry."""
    import importlib

    monkeypatch.setattr(importlib.import_module("fi_core.registry"), "_registry", current)
    yield current
    monkeypatch.undo()


def test_dispatcher_follows_use_and_the_registry(installed: KernelRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch, cpu = Dispatcher("toy", "size"), torch.device("cpu")
    assert dispatch(cpu, 4) == "fast"
    with fi.use(backend="slow"):
        assert dispatch(cpu, 4) == "slow"
        with fi.use(backend="fast"):
            assert dispatch(cpu, 4) == "fast"
        assert dispatch(cpu, 4) == "slow"
    assert dispatch(cpu, 4) == "fast"
    other = KernelRegistry([TOY])
    other.register_plugin(_plugin("only", 1, Between(1)), "only")
    import importlib

    monkeypatch.setattr(importlib.import_module("fi_core.registry"), "_registry", other)
    assert dispatch(cpu, 4) == "only"
    assert select_for("toy", "cpu", size=4).entry.full_name == "only.k"


def test_dispatcher_sees_a_plugin_registered_later(installed: KernelRegistry) -> None:
    dispatch, cpu = Dispatcher("toy", "size"), torch.device("cpu")
    assert dispatch(cpu, 4) == "fast"
    installed.register_plugin(_plugin("faster", 200, Between(1)), "faster")
    assert dispatch(cpu, 4) == "faster"


def test_use_is_local_to_the_thread_and_restored_after_errors(installed: KernelRegistry) -> None:
    seen: list[str | None] = []
    with pytest.raises(RuntimeError, match="inside"), fi.use(backend="slow"):
        thread = threading.Thread(target=lambda: seen.append(forced_backend()))
        thread.start()
        thread.join()
        raise RuntimeError("inside")
    assert seen == [None]
    assert forced_backend() is None
    with pytest.raises(fi.UnknownBackendError, match="nope"), fi.use(backend="nope"):
        pytest.fail("entered")


def test_explain_of_a_spec_and_of_a_request() -> None:
    spec = fi.AttentionSpec(8, 2, 64, dtype=torch.float32)
    text = fi.explain(spec, device="cpu")
    assert "max_q_len=1" in text.splitlines()[0]
    assert "chosen: " in text
    assert "max_q_len=77" in fi.explain(spec, device="cuda:sm_90", max_q_len=77)
    request = registry().operations["rmsnorm"].request(CPU, dtype=torch.float32, hidden_size=8, out_format="same")
    with fi.use(backend="reference"):
        assert "chosen: reference.rmsnorm (backend 'reference' was asked for)" in fi.explain(request)
    with pytest.raises(fi.ArgumentError, match="device"):
        fi.explain(request, device="cpu")
    with pytest.raises(fi.ArgumentError, match="device"):
        fi.explain(spec, device="toaster")
    with pytest.raises(fi.ArgumentError, match="^what: expected an AttentionSpec or a Request, got str"):
        fi.explain("attention")
    refused = registry().operations["rmsnorm"].request(CPU, dtype=torch.int8, hidden_size=8, out_format="same")
    with pytest.raises(fi.UnsupportedError, match="dtype: int8 is not one of"):
        fi.explain(refused)
