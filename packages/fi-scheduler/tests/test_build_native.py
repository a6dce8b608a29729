"""The build of the native module: reports what is missing, and marks the module with its sources."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fi_core.registry import KernelRegistry
from fi_scheduler import build_native, plugin
from fi_scheduler.partition import implementation


def test_the_built_module_names_its_sources(native: ModuleType | None) -> None:
    assert (native is None) == (build_native.obstacle() is not None)
    if native is not None:
        assert native.SOURCE_DIGEST == build_native.source_digest()


def test_the_digest_follows_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changed = tmp_path / "partition.cuh"
    changed.write_bytes(build_native.SOURCES[0].read_bytes() + b"// changed")
    before = build_native.source_digest()
    monkeypatch.setattr(build_native, "SOURCES", (changed, *build_native.SOURCES[1:]))
    assert build_native.source_digest() != before


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(build_native.NativeBuildError, match="compiler 'no-such-compiler': no such program"):
        build_native.build(tmp_path, "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build_native.NativeBuildError, match=r"no C\+\+ compiler found"):
        build_native.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_compiler_is_quoted(tmp_path: Path) -> None:
    compiler = tmp_path / "failing"
    compiler.write_text("#!/bin/sh\necho the compiler objects >&2\nexit 3\n")
    compiler.chmod(0o755)
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(build_native.NativeBuildError, match="the compiler objects"):
        build_native.build(target, str(compiler))
    assert list(target.iterdir()) == []


def test_the_builder_runs_without_the_rest_of_fi() -> None:
    """The wheel's build hook loads the file alone, where neither torch nor fi-core is installed."""
    program = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('build_native', {build_native.__file__!r}); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'fi_core', 'fi_scheduler')))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_doctor_says_which_partition_is_in_use() -> None:
    registry = KernelRegistry([])
    assert registry.register_plugin(plugin, "scheduler") is None
    (lines,) = registry.manager.hook.fi_doctor()
    assert lines == [f"work partition: {implementation().name} ({implementation().reason})"]
