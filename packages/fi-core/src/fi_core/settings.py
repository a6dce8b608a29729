"""The one place that reads the environment: a table of settings, strictly parsed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from .errors import SettingsError


def _flag(text: str) -> bool:
    values = {"0": False, "1": True}
    if text not in values:
        raise ValueError("0 or 1")
    return values[text]


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise ValueError("a number from 0 to 1")
    return value


@dataclass(frozen=True)
class Settings:
    """Process-wide settings. Each field ``x`` is read from the environment variable ``FI_X``."""

    check: bool = False
    """FI_CHECK=1: validate indices from the user on the device; the next call raises what was found."""
    shadow: float = 0.0
    """FI_SHADOW=f: run this fraction of the calls beside the reference and compare (1: every call)."""
    backend: str | None = None
    """FI_BACKEND=name: only this backend (and what it cannot serve fails)."""
    disable_plugins: tuple[str, ...] = ()
    """FI_DISABLE_PLUGINS=a,b: entry points that are not loaded."""
    cache_dir: str = ""
    """FI_CACHE_DIR=folder: where backends keep compiled kernels (default: fi under XDG_CACHE_HOME or ~/.cache)."""

    @property
    def cache_folder(self) -> Path:
        """``cache_dir``, or its default, as an absolute path."""
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(self.cache_dir or f"{base}/fi").expanduser().absolute()


_PARSERS: Mapping[str, Callable[[str], object]] = {
    "check": _flag,
    "shadow": _fraction,
    "backend": str,
    "cache_dir": str,
    "disable_plugins": lambda text: tuple(name for name in text.split(",") if name),
}


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Parse the variables of ``environ`` that name a setting; SettingsError for a value that does not parse. Other
    ``FI_*`` names are left alone (``fi doctor`` lists them)."""
    known = {f"FI_{field.name.upper()}": field.name for field in fields(Settings)}
    values: dict[str, object] = {}
    for variable, text in environ.items():
        if variable not in known:
            continue
        name = known[variable]
        try:
            values[name] = _PARSERS[name](text)
        except ValueError as error:
            raise SettingsError(f"{variable}={text!r}: expected {error}") from error
    return Settings(**values)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process, read once; ``settings.cache_clear()`` reads them again."""
    return read_settings(os.environ)
