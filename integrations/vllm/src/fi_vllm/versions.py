"""Which vLLM this package is written for, and the refusal of any other."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SERIES = "0.22"
TESTED = "0.22.1"


class EngineVersionError(RuntimeError):
    """The vLLM that is installed is not of the series that this package is written for."""


def check_version(found: str | None) -> None:
    """Raise EngineVersionError unless ``found`` (None: vLLM is not installed) is of the series 0.22.

    The classes that a backend derives from change between minor versions of vLLM: a method under an older name would
    never be called, and nothing would say so.
    """
    if found is not None and found.split("+")[0].split(".")[:2] == SERIES.split("."):
        return
    here = "is not installed" if found is None else f"{found} is installed"
    raise EngineVersionError(
        f"fi-vllm serves vLLM {SERIES}.x (tested with {TESTED}), and vLLM {here}: "
        f"pip install 'vllm=={TESTED}', or uninstall fi-vllm, or leave its plugins out with VLLM_PLUGINS"
    )


def check_engine() -> None:
    """``check_version`` of the vLLM that is installed or, in a plain source folder, of the one that can be imported."""
    try:
        found: str | None = version("vllm")
    except PackageNotFoundError:
        found = _of_source_folder()
    check_version(found)


def _of_source_folder() -> str | None:
    try:
        from vllm._version import __version__
    except ImportError:
        return None
    return str(__version__)
