"""Kernels are launched on the device that holds their tensors, whatever device is current."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import fi_triton
import pytest
import torch
from fi_triton.launch import on_device

SOURCES = Path(fi_triton.__file__).parent
GUARDED_BY_CALLERS = {"self._merge", "plan_on_device"}
"""Functions that launch and are called inside the guard."""


def test_another_device_is_made_current_and_the_current_one_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    other = on_device(torch.device("cuda:1"))
    assert isinstance(other, torch.cuda.device) and other.idx == 1
    for name in ("cuda:0", "cuda", "cpu"):
        assert isinstance(on_device(torch.device(name)), nullcontext)


def _launches(node: ast.AST, function: str, guarded: bool) -> Iterator[tuple[str, bool]]:
    """(function, whether inside ``with on_device``) of each ``..._kernel[grid](...)`` and each call of GUARDED_BY_CALLERS."""
    for child in ast.iter_child_nodes(node):
        inside, name = guarded, function
        if isinstance(child, ast.FunctionDef):
            inside, name = bool({child.name, f"self.{child.name}"} & GUARDED_BY_CALLERS), child.name
        elif isinstance(child, ast.With):
            inside = guarded or any("on_device(" in ast.unparse(item) for item in child.items)
        elif isinstance(child, ast.Call):
            called = child.func
            launches = isinstance(called, ast.Subscript) and ast.unparse(called.value).endswith("_kernel")
            if launches or ast.unparse(called) in GUARDED_BY_CALLERS:
                yield name, guarded
        yield from _launches(child, name, inside)


def test_every_launch_stands_inside_the_guard() -> None:
    found = {
        f"{path.relative_to(SOURCES)}: {function}": guarded
        for path in SOURCES.rglob("*.py")
        for function, guarded in _launches(ast.parse(path.read_text()), "module", False)
    }
    assert len(found) >= 12
    assert [place for place, guarded in found.items() if not guarded] == []
