"""Which version of an engine an adapter is written for, and the refusal of any other."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


class EngineVersionError(RuntimeError):
    """The engine that is installed is not of the series that the adapter is written for."""


@dataclass(frozen=True)
class Engine:
    """An engine as an adapter knows it: its distribution, the numbers that a version must begin with, the version that the
    adapter was tested with, the module that names its version in a source folder, and how to leave the adapter out."""

    name: str
    series: str
    tested: str
    version_module: str
    leave_out: str

    def check(self) -> None:
        """``check_version`` of what is installed or, in a plain source folder, of what can be imported."""
        try:
            found: str | None = version(self.name)
        except PackageNotFoundError:
            found = self._of_source_folder()
        self.check_version(found)

    def check_version(self, found: str | None) -> None:
        """Raise EngineVersionError unless ``found`` (None: not installed) is of the series.

        The classes that a backend derives from change between minor versions: a method under an older name would never be
        called, and nothing would say so.
        """
        wanted = self.series.split(".")
        if found is not None and found.split("+")[0].split(".")[: len(wanted)] == wanted:
            return
        here = "it is not installed" if found is None else f"{found} is installed"
        raise EngineVersionError(
            f"fi-{self.name} serves {self.name} {self.series}.x (tested with {self.tested}), and {here}: "
            f"pip install '{self.name}=={self.tested}', or uninstall fi-{self.name}, or leave it out with {self.leave_out}"
        )

    def _of_source_folder(self) -> str | None:
        try:
            return str(importlib.import_module(self.version_module).__version__)
        except ImportError:
            return None
