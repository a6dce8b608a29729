"""Conformance cases as pytest parameters; pytest is imported only when this is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import ArgumentError, PluginError
from .kit import BoundCase, bound_cases
from .report import CaseResult

if TYPE_CHECKING:
    from pytest import MarkDecorator


def parametrize(
    backend: str,
    ops: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    cases: str | None = None,
    seed: int = 0,
    include_large: bool = False,
) -> MarkDecorator:
    """A decorator that runs a test function once a case and kernel; arguments as for ``run``::

        @conformance.parametrize("my_backend", device="cuda")
        def test_conformance(case):
            case()

    Cases that the backend does not declare are left out; raises ArgumentError if none remains, and PluginError if an
    operation's cases cannot be made.
    """
    import pytest

    matching = list(bound_cases(backend, ops, device, cases, seed, include_large))
    broken = [str(item) for item in matching if isinstance(item, CaseResult) and item.outcome == "failed"]
    if broken:
        raise PluginError("\n".join(broken))
    found = [item for item in matching if isinstance(item, BoundCase)]
    if not found:
        raise ArgumentError("conformance.parametrize", f"a case that {backend!r} serves on {device}", "none")
    return pytest.mark.parametrize("case", found, ids=[item.name for item in found])
