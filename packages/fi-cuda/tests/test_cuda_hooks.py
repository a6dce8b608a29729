"""Hooks of the compile pipeline: who is asked when, what a wrong answer does, and what an observer sees."""

import dataclasses
from types import SimpleNamespace

import fi_cuda.compile
import fi_cuda.plugin
import pluggy
import pytest
from fi_core.errors import PluginError
from fi_core.hookspecs import hookimpl
from fi_core.ops import OPERATIONS
from fi_core.registry import KernelRegistry
from fi_cuda.cache import Artifact, ArtifactCache, Resources
from fi_cuda.compile import build, content_key
from fi_cuda.hookspecs import declare
from fi_cuda.source import CompileTarget, KernelSource
from fi_cuda.toolchain import CompileError, ToolchainError

pytestmark = pytest.mark.timeout(120)

SOURCE = KernelSource("scale_rows", "scale", 'extern "C" __global__ void scale(float* x) { *x *= 2.0f; }\n', ())
TARGET = CompileTarget("sm_80", fast_math=True)


def artifact(compiler="acme 7", **changes):
    key = SOURCE.key(TARGET, compiler)
    fields = ("scale_rows", key, "scale", "sm_80", ("fast_math=True",), compiler, SOURCE.text)
    return dataclasses.replace(Artifact(*fields, Resources(8, 0, 0, 0, 0), 0.5, b"\x7fELF scale"), **changes)


@pytest.fixture
def registry(monkeypatch):
    made = KernelRegistry(OPERATIONS)
    monkeypatch.setattr(fi_cuda.compile, "registry", lambda: made)
    made.register_plugin(fi_cuda.plugin, "cuda")
    return made


@pytest.fixture
def cache(tmp_path):
    return ArtifactCache(tmp_path / "cache")


def no_toolchain():
    raise ToolchainError("no NVRTC here")


def plugin(**hooks):
    """A plugin with the given functions as optional hooks; a value that is no function is what the hook returns."""
    functions = {
        "fi_find_artifact": lambda value: lambda key: value,
        "fi_compile": lambda value: lambda source, target: value,
    }
    named = {}
    for name, value in hooks.items():
        function = value if callable(value) else functions[name](value)
        named[name] = hookimpl(optionalhook=True)(function)
    return SimpleNamespace(**named)


def test_artifact_made_ahead_of_time_needs_neither_compiler_nor_cache(registry, monkeypatch, tmp_path):
    monkeypatch.setattr(fi_cuda.compile, "find_toolchain", no_toolchain)
    asked = []

    def find(key):
        asked.append(key)
        return artifact()

    registry.register_plugin(plugin(fi_find_artifact=find), "acme")
    assert build(SOURCE, TARGET, ArtifactCache(tmp_path / "absent")) == artifact()
    assert asked == [content_key(SOURCE, TARGET)]
    assert not (tmp_path / "absent").exists()


def test_content_key_tells_sources_flags_and_archs_apart():
    other = KernelSource("scale_rows", "scale", SOURCE.text.replace("2.0f", "3.0f"), ())
    keys = {
        content_key(SOURCE, TARGET),
        content_key(other, TARGET),
        content_key(SOURCE, CompileTarget("sm_80")),
        content_key(SOURCE, CompileTarget("sm_90a", fast_math=True)),
    }
    assert len(keys) == 4


def test_compiler_of_a_plugin_is_used_and_its_result_stays_out_of_the_cache(registry, monkeypatch, cache):
    monkeypatch.setattr(fi_cuda.compile, "find_toolchain", no_toolchain)
    asked = []

    def compile_it(source, target):
        asked.append((source, target))
        return artifact()

    registry.register_plugin(plugin(fi_find_artifact=None, fi_compile=compile_it), "acme")
    assert build(SOURCE, TARGET, cache) == artifact()
    assert asked == [(SOURCE, TARGET)]
    assert cache.names() == []


def test_none_leaves_it_to_the_next_plugin_and_then_to_nvrtc(registry, cache):
    registry.register_plugin(plugin(fi_find_artifact=None, fi_compile=None), "first")
    registry.register_plugin(plugin(fi_find_artifact=None, fi_compile=None), "second")
    made = build(SOURCE, TARGET, cache)
    assert made.cubin.startswith(b"\x7fELF") and made.compiler.startswith("(")
    registry.register_plugin(plugin(fi_find_artifact=artifact()), "third")
    registry.register_plugin(plugin(fi_find_artifact=None), "fourth")
    assert build(SOURCE, TARGET, cache) == artifact()


@pytest.mark.parametrize("hook", ["fi_find_artifact", "fi_compile"])
@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (artifact(stem="rope"), "wrong stem"),
        (artifact(symbol="other"), "wrong symbol"),
        (artifact(text=SOURCE.text + "// edited\n"), "wrong text"),
        (artifact(arch="sm_90a"), "wrong arch"),
        (artifact(flags=()), "wrong flags"),
        (artifact(key="0" * 40), "wrong key"),
        (artifact(compiler="acme 7", key=SOURCE.key(TARGET, "acme 8")), "wrong key"),
        (artifact(cubin=b"\x7fELF other"), "wrong cubin"),
        (b"\x7fELF scale", "bytes, not an Artifact"),
    ],
)
def test_wrong_artifact_is_an_error_that_names_the_plugin(registry, cache, hook, answer, wrong):
    registry.register_plugin(plugin(**{hook: None}), "innocent")
    registry.register_plugin(plugin(**{hook: answer}), "acme")
    with pytest.raises(PluginError, match=f"{hook} of acme returned.*{wrong}"):
        build(SOURCE, TARGET, cache)
    assert cache.names() == []


def test_what_a_hook_raises_names_the_plugin_unless_it_is_ours(registry, cache):
    def fail(key):
        raise KeyError("index")

    registry.register_plugin(plugin(fi_find_artifact=fail), "acme")
    with pytest.raises(PluginError, match="fi_find_artifact of acme raised KeyError: 'index'"):
        build(SOURCE, TARGET, cache)

    def refuse(source, target):
        raise CompileError(source.stem, target.arch, "line 3")

    registry.manager.unregister(name="acme")
    registry.register_plugin(plugin(fi_compile=refuse), "acme")
    with pytest.raises(CompileError, match="line 3"):
        build(SOURCE, TARGET, cache)


def test_wrapper_is_refused(registry, cache):
    def wrap(source, target):
        return (yield)

    registry.register_plugin(SimpleNamespace(fi_compile=hookimpl(wrapper=True)(wrap)), "acme")
    with pytest.raises(PluginError, match="fi_compile of acme is a wrapper"):
        build(SOURCE, TARGET, cache)


def test_observer_sees_every_artifact_and_where_it_came_from(registry, cache, monkeypatch):
    events = []
    registry.register_plugin(plugin(fi_on_compile=lambda event: events.append(event)), "observer")
    made = build(SOURCE, TARGET, cache)
    build(SOURCE, TARGET, cache)
    registry.register_plugin(plugin(fi_compile=artifact()), "acme")
    build(SOURCE, TARGET, cache)
    registry.register_plugin(plugin(fi_find_artifact=artifact()), "wheel")
    build(SOURCE, TARGET, cache)
    origins = ["nvrtc", "cache", "fi_compile of acme", "fi_find_artifact of wheel"]
    assert [event.origin for event in events] == origins
    assert [event.key for event in events] == [made.key, made.key, artifact().key, artifact().key]
    assert all(event.stem == "scale_rows" and event.seconds > 0 for event in events)
    assert events[0].seconds >= made.compile_s


def test_failing_observer_is_an_error(registry, cache):
    def fail(event):
        raise ValueError("full")

    registry.register_plugin(plugin(fi_find_artifact=artifact(), fi_on_compile=fail), "observer")
    with pytest.raises(PluginError, match="fi_on_compile hook raised ValueError: full"):
        build(SOURCE, TARGET, cache)


def test_plugin_may_be_loaded_before_the_cuda_plugin_if_its_hooks_are_optional():
    made = KernelRegistry(OPERATIONS)
    with pytest.raises(PluginError, match="unknown hook 'fi_find_artifact'"):
        made.register_plugin(SimpleNamespace(fi_find_artifact=hookimpl(lambda key: None)), "strict")
    made.register_plugin(plugin(fi_find_artifact=artifact()), "early")
    made.register_plugin(fi_cuda.plugin, "cuda")
    assert made.manager.hook.fi_find_artifact(key="") == artifact()


def test_hook_with_an_unknown_parameter_is_named():
    manager = pluggy.PluginManager("fi")
    manager.register(plugin(fi_compile=lambda program: None), "acme")
    with pytest.raises(PluginError, match="(?s)plugin 'acme'.*fi_compile.*program"):
        declare(manager)


def test_doctor_tells_compiler_cache_and_driver(monkeypatch, tmp_path):
    cache = ArtifactCache(tmp_path / "cache")
    monkeypatch.setattr(fi_cuda.compile, "default_cache", lambda: cache)
    compiler, state, driver = fi_cuda.plugin.fi_doctor()
    assert compiler.startswith("compiler: NVRTC")
    assert state == f"cache {tmp_path}/cache: not made yet"
    assert driver.startswith("driver: libcuda ")
    cache.find_or_make(artifact().name, artifact)
    monkeypatch.setattr("fi_cuda.toolchain.find_toolchain", no_toolchain)
    monkeypatch.setattr("fi_cuda.toolchain.has_driver", lambda: False)
    compiler, state, driver = fi_cuda.plugin.fi_doctor()
    assert "no NVRTC here" in compiler
    assert state.endswith(": 1 artifacts")
    assert "libcuda not found" in driver
