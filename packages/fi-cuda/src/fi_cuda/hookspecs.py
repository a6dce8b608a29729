"""Hooks of the compile pipeline: where artifacts come from. They are asked once for each kernel, never per launch.

They live in fi-core's plugin manager (pluggy project ``fi``) from the moment the CUDA plugin registers. A plugin that
implements them marks each with ``@hookimpl(optionalhook=True)`` (``fi_core.hookspecs.hookimpl``): it may be loaded
before the CUDA plugin, or without it, and a hook nobody has declared is refused otherwise. Parameter names are part of
the interface. A plugin needs no backend of its own: these hooks alone are enough.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pluggy
from fi_core.errors import PluginError
from fi_core.hookspecs import hookspec

if TYPE_CHECKING:
    from .cache import Artifact
    from .source import CompileTarget, KernelSource


@dataclass(frozen=True)
class CompileEvent:
    """An artifact that the pipeline handed out: its stem and key, the ``seconds`` that getting it took, and its
    ``origin``: "nvrtc" (compiled now), "cache", or the hook and the plugin that gave it ("fi_compile of NAME")."""

    stem: str
    key: str
    seconds: float
    origin: str


@hookspec(firstresult=True)
def fi_find_artifact(key: str) -> Artifact | None:
    """The artifact made ahead of time whose content key is ``key`` (``fi_cuda.compile.content_key``: text, headers,
    flags and arch, but not the compiler, which need not be installed).

    Called by ``fi_cuda.compile.build`` before anything else, once for each kernel that a process needs. None: this
    plugin has none; the next one is asked, and at last ``fi_compile``. What is returned is checked (stem, symbol, text,
    arch, flags, key); a wrong artifact is a PluginError that names the plugin.
    """


@hookspec(firstresult=True)
def fi_compile(source: KernelSource, target: CompileTarget) -> Artifact | None:
    """Compile ``source`` by other means. ``Artifact.compiler`` says by what, and ``Artifact.key`` is
    ``source.key(target, compiler)`` with it; a wrong artifact is a PluginError that names the plugin.

    Called by ``fi_cuda.compile.build`` when no plugin has the artifact ahead of time, once for each kernel that a
    process needs, perhaps from several threads. The result does not enter the cache, whose names hold NVRTC's version;
    a slow compiler keeps an ``ArtifactCache`` of its own. None: left to the next plugin, and at last to the cache and
    NVRTC. A CompileError is passed on to the caller; any other exception becomes a PluginError.
    """


@hookspec
def fi_on_compile(event: CompileEvent) -> None:
    """Observe an artifact that ``fi_cuda.compile.build`` is about to return, wherever it came from; failed compilations
    are not events. May be called from several threads."""


def declare(manager: pluggy.PluginManager) -> None:
    """Add these hooks to ``manager`` unless it has them; PluginError names a plugin that implements one wrongly."""
    if hasattr(manager.hook, "fi_on_compile") and manager.hook.fi_on_compile.has_spec():
        return
    try:
        manager.add_hookspecs(sys.modules[__name__])
    except pluggy.PluginValidationError as error:
        raise PluginError(f"plugin {manager.get_name(error.plugin)!r}: {error}") from error
