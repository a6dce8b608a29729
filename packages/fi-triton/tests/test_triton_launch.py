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
GUARDED_BY_CALLERS = {
    "self._merge": "attention/state.py: _merge",
    "plan_on_device": "attention/plan_kernel.py: plan_on_device",
    "self._levels.update": "attention/levels.py: update",
    "self._levels.run": "attention/levels.py: run",
    "self._plan_nodes": "attention/levels.py: _plan_nodes",
    "_spread": "sampling/penalize_logits.py: _spread",
}
"""Calls that must stand inside the guard -> the function that launches there."""


def test_another_device_is_made_current_and_the_current_one_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    other = on_device(torch.device("cuda:1"))
    assert isinstance(other, torch.cuda.device) and other.idx == 1
    for name in ("cuda:0", "cuda", "cpu"):
        assert isinstance(on_device(torch.device(name)), nullcontext)


def _launches(node: ast.AST, file: str, function: str, guarded: bool) -> Iterator[tuple[str, bool]]:
    """("file: function", whether inside ``with on_device``) of each ``..._kernel[grid](...)`` and call of GUARDED_BY_CALLERS."""
    for child in ast.iter_child_nodes(node):
        inside, name = guarded, function
        if isinstance(child, ast.FunctionDef):
            name = child.name
            inside = f"{file}: {name}" in GUARDED_BY_CALLERS.values()
        elif isinstance(child, ast.With):
            inside = guarded or any("on_device(" in ast.unparse(item) for item in child.items)
        elif isinstance(child, ast.Call):
            called = child.func
            launches = isinstance(called, ast.Subscript) and ast.unparse(called.value).endswith("_kernel")
            if launches or ast.unparse(called) in GUARDED_BY_CALLERS:
                yield f"{file}: {name}", guarded
        yield from _launches(child, file, name, inside)


def test_every_launch_stands_inside_the_guard() -> None:
    found = [
        launch
        for path in SOURCES.rglob("*.py")
        for launch in _launches(ast.parse(path.read_text()), str(path.relative_to(SOURCES)), "module", False)
    ]
    assert len(dict(found)) >= 12
    assert [place for place, guarded in found if not guarded] == []
