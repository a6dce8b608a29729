"""Fixtures of the scheduler's tests: the native module, taken as built or compiled for the session."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fi_scheduler import build_native
from fi_scheduler.partition import implementation

# pytest's importlib mode leaves sys.path alone; the tests share helpers that lie beside them.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> ModuleType | None:
    """The native module: the installed one, else one compiled here; None only where there is no compiler."""
    if implementation().name == "native":
        return importlib.import_module("fi_scheduler._partition")
    if build_native.obstacle() is not None:
        return None
    path = build_native.build(tmp_path_factory.mktemp("native"))
    spec = importlib.util.spec_from_file_location("fi_scheduler._partition", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
