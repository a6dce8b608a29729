"""Entry point of fi-scheduler: what ``fi doctor`` says about it."""

from __future__ import annotations

from .hookspecs import hookimpl


@hookimpl
def fi_doctor() -> list[str]:
    """Which implementation of the work partition is in use, and why."""
    # Here, so that loading the plugin does not load the native module.
    from .partition import implementation

    chosen = implementation()
    return [f"work partition: {chosen.name} ({chosen.reason})"]
