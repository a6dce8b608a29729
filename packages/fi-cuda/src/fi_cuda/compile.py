"""From a source to an artifact: plugin hooks, the cache, and NVRTC where neither has it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path

from fi_core.errors import FiError, PluginError
from fi_core.registry import registry
from fi_core.settings import settings

from .cache import Artifact, ArtifactCache, Resources
from .hookspecs import CompileEvent, declare
from .source import CompileTarget, KernelSource
from .toolchain import CompileError, compile_cubin, find_toolchain

INCLUDE_FOLDER = Path(__file__).parent / "include"
"""This package's device headers; quoted includes start below it with ``fi/``."""

_RESOURCES = {
    "num_registers": re.compile(r"Used (\d+) registers"),
    "shared_bytes": re.compile(r"(\d+) bytes smem"),
    "stack_bytes": re.compile(r"(\d+) bytes stack frame"),
    "spill_store_bytes": re.compile(r"(\d+) bytes spill stores"),
    "spill_load_bytes": re.compile(r"(\d+) bytes spill loads"),
}


def default_cache() -> ArtifactCache:
    """The user's cache: the folder ``cuda`` in the cache folder of the settings."""
    return ArtifactCache(settings().cache_folder / "cuda")


def parse_resources(report: str) -> Resources:
    """The figures in ptxas -v's report; static shared memory is absent from it when the kernel has none."""
    found = {name: pattern.search(report) for name, pattern in _RESOURCES.items()}
    return Resources(**{name: int(match.group(1)) if match else 0 for name, match in found.items()})


def compile_source(source: KernelSource, target: CompileTarget) -> Artifact:
    """Compile with NVRTC, whatever the cache holds; raises ToolchainError, SourceError, or CompileError (with log)."""
    compiler = str(find_toolchain().nvrtc_version)
    started = time.perf_counter()
    cubin = compile_cubin(source.text, source.stem, target, source.include_folders)
    if source.symbol.encode() not in cubin.code:
        raise CompileError(source.stem, target.arch, f"the machine code has no symbol {source.symbol}")
    return Artifact(
        stem=source.stem,
        key=source.key(target, compiler),
        symbol=source.symbol,
        arch=target.arch,
        flags=target.flags,
        compiler=compiler,
        text=source.text,
        resources=parse_resources(cubin.report),
        compile_s=time.perf_counter() - started,
        cubin=cubin.code,
    )


def content_key(source: KernelSource, target: CompileTarget) -> str:
    """What ``fi_find_artifact`` is asked for: the key of everything but the compiler. Machine code of the same text,
    headers, flags and arch is right whichever compiler made it, and its user needs none."""
    return source.key(target, compiler="")


def find_ahead_of_time(source: KernelSource, target: CompileTarget) -> tuple[Artifact, str] | None:
    """The artifact that a plugin made ahead of time, checked, and its origin; None if no plugin has it."""
    return _from_plugins("fi_find_artifact", source, target, {"key": content_key(source, target)})


def build(source: KernelSource, target: CompileTarget, cache: ArtifactCache) -> Artifact:
    """The artifact of ``source`` for ``target``: from a plugin's hook, from ``cache``, or compiled once and published
    there. With a plugin that has it, neither a compiler nor a cache folder is needed.

    Raises ToolchainError, SourceError, CompileError, CacheError; PluginError when a hook raises or returns an artifact
    of something else.
    """
    started = time.perf_counter()
    found = find_ahead_of_time(source, target)
    found = found or _from_plugins("fi_compile", source, target, {"source": source, "target": target})
    artifact, origin = found or _cached_or_compiled(source, target, cache)
    event = CompileEvent(artifact.stem, artifact.key, time.perf_counter() - started, origin)
    try:
        registry().manager.hook.fi_on_compile(event=event)
    except Exception as error:
        raise PluginError(f"a fi_on_compile hook raised {type(error).__name__}: {error}") from error
    return artifact


def _cached_or_compiled(source: KernelSource, target: CompileTarget, cache: ArtifactCache) -> tuple[Artifact, str]:
    compiler = str(find_toolchain().nvrtc_version)
    origin = "cache"

    def compile_now() -> Artifact:
        nonlocal origin
        origin = "nvrtc"
        return compile_source(source, target)

    artifact = cache.find_or_make(f"{source.stem}-{source.key(target, compiler)}", compile_now)
    return artifact, origin


def _from_plugins(
    hook: str, source: KernelSource, target: CompileTarget, asked: Mapping[str, object]
) -> tuple[Artifact, str] | None:
    """The first artifact that ``hook`` gives when asked, checked, and its origin. The plugins are asked one by one, in
    pluggy's order, because pluggy does not tell whose result it returns."""
    manager = registry().manager
    declare(manager)
    for implementation in reversed(getattr(manager.hook, hook).get_hookimpls()):
        origin = f"{hook} of {implementation.plugin_name}"
        if implementation.wrapper or implementation.hookwrapper:
            raise PluginError(f"{origin} is a wrapper; this hook has none")
        try:
            artifact = implementation.function(*(asked[name] for name in implementation.argnames))
        except FiError:
            raise
        except Exception as error:
            raise PluginError(f"{origin} raised {type(error).__name__}: {error}") from error
        if artifact is not None:
            _check(artifact, source, target, origin)
            return artifact, origin
    return None


def _check(artifact: object, source: KernelSource, target: CompileTarget, origin: str) -> None:
    if not isinstance(artifact, Artifact):
        raise PluginError(f"{origin} returned {type(artifact).__name__}, not an Artifact")
    expected = {
        "stem": source.stem,
        "symbol": source.symbol,
        "text": source.text,
        "arch": target.arch,
        "flags": target.flags,
        "key": source.key(target, artifact.compiler),
    }
    wrong = [name for name, value in expected.items() if getattr(artifact, name) != value]
    if source.symbol.encode() not in artifact.cubin:
        wrong.append("cubin")
    if wrong:
        raise PluginError(f"{origin} returned {artifact.name} for {source.stem}: wrong {', '.join(wrong)}")
