"""The state of an installation as text: versions, devices, settings, plugins and what they say of themselves."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from .registry import KernelRegistry, registry
from .settings import Settings, settings


@dataclass(frozen=True)
class Diagnosis:
    """Lines to print, and the problems among them (empty: all is well)."""

    lines: tuple[str, ...]
    problems: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Look at this process's installation; loads every plugin and asks the CUDA driver for its devices."""
    current = registry()
    problems = [
        f"plugin {item.entry_point} ({item.distribution}): {item.error}" for item in current.statuses if item.error
    ]
    lines = [*_versions(), *_devices(), *_settings(), *_plugins(current)]
    for name, reported, error in _reports(current):
        if error is not None:
            problems.append(f"plugin {name}: fi_doctor raised {error}")
        lines += [f"  {name}: {line}" for line in reported]
    lines += [f"problem: {problem}" for problem in problems]
    return Diagnosis(tuple(lines), tuple(problems))


def _versions() -> Iterator[str]:
    from . import __version__

    yield f"fi-core {__version__}, python {platform.python_version()}, {platform.platform()}"
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none (a CPU build)'}"


def _devices() -> Iterator[str]:
    yield f"device cpu: {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        size = found.total_memory / 2**30
        yield f"device cuda:{index}: {found.name}, sm_{found.major}{found.minor}, {size:.1f} GiB"
    if torch.cuda.device_count() == 0:
        yield "device cuda: none"


def _settings() -> Iterator[str]:
    current = settings()
    for field in fields(Settings):
        value = getattr(current, field.name)
        if value != field.default:
            yield f"setting FI_{field.name.upper()}: {value}"
    known = {f"FI_{field.name.upper()}" for field in fields(Settings)}
    for variable in sorted(os.environ):
        if variable.startswith("FI_") and variable not in known:
            yield f"setting {variable}: not one of fi-core's"


def _plugins(current: KernelRegistry) -> Iterator[str]:
    for status in current.statuses:
        name = f"plugin {status.entry_point} ({status.distribution})"
        if status.error is not None:
            yield f"{name}: failed to load"
        elif status.info is None:
            yield f"{name}: loaded, no backend of its own"
        else:
            kernels = [item for item in current.kernels() if item.backend == status.info.name]
            yield f"{name}: {status.info.summary}; priority {status.info.priority}, {len(kernels)} kernels"
    for name in settings().disable_plugins:
        yield f"plugin {name}: disabled by FI_DISABLE_PLUGINS"


def _reports(current: KernelRegistry) -> Iterator[tuple[str, list[str], str | None]]:
    """(plugin, lines, error) of every ``fi_doctor`` hook."""
    for implementation in current.manager.hook.fi_doctor.get_hookimpls():
        try:
            lines: list[str] = implementation.function()  # type: ignore[assignment]
            yield implementation.plugin_name, lines, None
        except Exception as error:  # noqa: BLE001 - a plugin's broken report must not hide the others'
            yield implementation.plugin_name, [], f"{type(error).__name__}: {error}"
