"""Kernels made ahead of time: what ninja builds again, damaged folders, and a wheel on a machine without a compiler."""

import base64
import csv
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import zipfile

import pytest
import torch
from fi_cuda import aot_edge, aot_steps
from fi_cuda.aot import AotFolder, build_folder, write_ninja
from fi_cuda.aot_steps import BUILT, INDEX, KERNELS, RECIPES, AotError, compile_recipe, write_index
from fi_cuda.cache import CUBIN
from fi_cuda.compile import compile_source, content_key
from fi_cuda.kernels.rmsnorm import RmsNormSpec
from fi_cuda.source import CompileTarget, KernelSource
from fi_cuda.wheel import pack_wheel

pytestmark = pytest.mark.timeout(300)

TARGET = CompileTarget("sm_80")
FACTOR = "#pragma once\n__device__ inline float factor() { return 2.0f; }\n"


@pytest.fixture
def include(tmp_path):
    folder = tmp_path / "in $clude #1"  # every character that ninja, make or the shell reads otherwise
    folder.mkdir()
    (folder / "factor.cuh").write_text(FACTOR)
    return folder


def kernel(include, stem, body):
    text = f'extern "C" __global__ void fi_{stem}(float* x) {{ *x *= {body}; }}\n'
    header = '#include "factor.cuh"\n' if "factor" in body else ""
    return KernelSource(stem, f"fi_{stem}", header + text, (include,))


def compiled_into(folder, *sources):
    """The same as build_folder, without ninja and its processes."""
    write_ninja(folder, sources, TARGET)
    recipes = sorted((folder / RECIPES).iterdir())
    for recipe in recipes:
        compile_recipe(recipe)
    write_index([folder / BUILT / recipe.name for recipe in recipes])
    return AotFolder(folder / KERNELS)


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}


@pytest.mark.slow
def test_ninja_builds_what_changed_and_nothing_else(include, tmp_path):
    out = tmp_path / "out $1 #2"
    sources = [kernel(include, "scale", "factor()"), kernel(include, "half", "0.5f")]
    found = build_folder(out, sources, TARGET, num_jobs=2)
    for source in sources:
        made = found.fi_find_artifact(content_key(source, TARGET))
        assert made.cubin == compile_source(source, TARGET).cubin
    before = times(out)
    build_folder(out, sources, TARGET, num_jobs=2)
    changed = {path for path, time in times(out).items() if before.get(path) != time}
    assert {path.name for path in changed} <= {".ninja_log", ".ninja_deps"}

    old_key = content_key(sources[0], TARGET)
    (include / "factor.cuh").write_text(FACTOR.replace("2.0f", "30.0f"))
    subprocess.run([sys.executable, "-m", "ninja", "-C", str(out)], check=True)
    found = AotFolder(out / KERNELS)
    assert found.fi_find_artifact(old_key) is None
    assert found.fi_find_artifact(content_key(sources[0], TARGET)) is not None
    changed = {path.name for path, time in times(out / BUILT).items() if before.get(path) != time}
    assert [name.partition("-")[0] for name in changed] == ["scale"]
    folders = [path.name for path in (out / KERNELS).iterdir() if path.is_dir()]
    assert sorted(name.partition("-")[0] for name in folders) == ["half", "scale"]


def edge(folder, *step):
    command = [sys.executable, "-I", "-S", aot_edge.__file__, *step]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_the_process_that_starts_ninja_compiles_for_its_edges(include, tmp_path, monkeypatch):
    compiled = []

    def recorded(recipe):
        compiled.append(recipe.name)
        compile_recipe(recipe)

    monkeypatch.setattr(aot_steps, "compile_recipe", recorded)
    out = tmp_path / ("a folder whose path is longer than the address of a socket can be " * 3)
    sources = [kernel(include, "scale", "factor()"), kernel(include, "half", "0.5f")]
    found = build_folder(out, sources, TARGET, num_jobs=2)
    assert sorted(name.partition("-")[0] for name in compiled) == ["half", "scale"]
    for source in sources:
        assert found.fi_find_artifact(content_key(source, TARGET)) is not None
    assert not (out / aot_edge.SERVER).exists()


def test_edge_compiles_by_itself_where_a_killed_build_left_its_socket(include, tmp_path):
    write_ninja(tmp_path, [kernel(include, "half", "0.5f")], TARGET)
    (recipe,) = (tmp_path / RECIPES).iterdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / aot_edge.SERVER))
    done = edge(tmp_path, "compile", f"{RECIPES}/{recipe.name}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / BUILT / recipe.name).is_file()


def test_edge_fails_when_its_server_dies(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / aot_edge.SERVER))
        listener.listen()

        def die():
            connection, _ = listener.accept()
            with connection:
                while connection.recv(4096):
                    pass

        thread = threading.Thread(target=die)
        thread.start()
        done = edge(tmp_path, "compile", f"{RECIPES}/absent.json")
        thread.join()
    assert done.returncode == 1
    assert done.stderr == "fi_cuda: the server of the build died\n"


def test_edge_needs_nothing_but_the_standard_library(tmp_path):
    script = "import json, runpy, sys; runpy.run_path(sys.argv[1]); print(json.dumps(list(sys.modules)))"
    command = [sys.executable, "-I", "-S", "-c", script, aot_edge.__file__]
    loaded = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert not {"torch", "numpy", "cuda", "fi_core", "fi_cuda"} & {name.split(".")[0] for name in json.loads(loaded)}


def test_source_that_does_not_compile_fails_the_build(include, tmp_path, capfd):
    with pytest.raises(AotError, match="ninja failed"):
        build_folder(tmp_path / "out", [kernel(include, "broken", "undeclared_name")], TARGET, num_jobs=1)
    assert "undeclared_name" in "".join(capfd.readouterr())
    assert not (tmp_path / "out" / KERNELS / INDEX).exists()


def test_spec_that_is_no_longer_shipped_leaves_the_folder(include, tmp_path):
    stays, goes = kernel(include, "scale", "factor()"), kernel(include, "half", "0.5f")
    compiled_into(tmp_path / "out", stays, goes)
    (tmp_path / "out" / KERNELS / ".tmp-killed").mkdir()
    found = compiled_into(tmp_path / "out", stays)
    assert found.fi_find_artifact(content_key(stays, TARGET)) is not None
    assert found.fi_find_artifact(content_key(goes, TARGET)) is None
    assert sorted(path.name.partition("-")[0] for path in (tmp_path / "out" / KERNELS).iterdir()) == [INDEX, "scale"]
    assert len(list((tmp_path / "out" / BUILT).glob("*.json"))) == 1


def test_recipe_of_another_compiler_is_refused(include, tmp_path):
    write_ninja(tmp_path, [kernel(include, "half", "0.5f")], TARGET)
    (recipe,) = (tmp_path / RECIPES).iterdir()
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "compiler": "(12, 9)"}))
    with pytest.raises(AotError, match=r"for NVRTC \(12, 9\), but \(\d+, \d+\) is installed"):
        compile_recipe(recipe)


def test_damaged_folder_is_an_error_that_says_what_to_do(include, tmp_path):
    source = kernel(include, "half", "0.5f")
    found = compiled_into(tmp_path / "out", source)
    (cubin,) = (tmp_path / "out" / KERNELS).glob(f"*/{CUBIN}")
    cubin.write_bytes(cubin.read_bytes()[:-1])
    with pytest.raises(AotError, match="is damaged: install its package again"):
        found.fi_find_artifact(content_key(source, TARGET))
    with pytest.raises(AotError, match="absent or damaged: remove"):
        write_index(list((tmp_path / "out" / BUILT).glob("*.json")))
    (tmp_path / "out" / KERNELS / INDEX).write_text("{")
    with pytest.raises(AotError, match="no readable index"):
        AotFolder(tmp_path / "out" / KERNELS)
    with pytest.raises(AotError, match="no kernel"):
        write_ninja(tmp_path / "none", [], TARGET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "hopper"], "--arch: expected an architecture"),
        (["--jobs", "none"], "--jobs: expected a whole number"),
        (["--jobs", "0"], "--jobs: expected a whole number"),
    ],
)
def test_wrong_option_is_named_and_nothing_is_written(tmp_path, capsys, options, message):
    from fi_cuda.aot import main

    assert main(["--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wheel_is_reproducible_and_its_record_is_right(include, tmp_path):
    kernels = compiled_into(tmp_path / "out", kernel(include, "half", "0.5f")).folder
    wheel = pack_wheel(kernels, "sm_80", tmp_path / "dist")
    assert wheel.name.startswith("fi_cuda_kernels_sm80-") and wheel.name.endswith("-py3-none-any.whl")
    assert wheel.read_bytes() == pack_wheel(kernels, "sm_80", tmp_path / "again").read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        (record_name,) = (name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        rows = list(csv.reader(archive.read(record_name).decode().splitlines()))
        assert sorted(row[0] for row in rows) == sorted(archive.namelist())
        for name, digest, size in rows:
            if name != record_name:
                data = archive.read(name)
                expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
                assert (digest, int(size)) == (f"sha256={expected}", len(data))


SCRIPT = """
import sys
from pathlib import Path
import torch
from cuda import pathfinder
from fi_core.registry import registry
from fi_cuda.cache import CacheError
from fi_cuda.compile import build, default_cache
from fi_cuda.kernels.rmsnorm import RmsNormSpec
from fi_cuda.source import CompileTarget
from fi_cuda.toolchain import ToolchainError, find_toolchain

def load(name):
    raise pathfinder.DynamicLibNotFoundError(name)

pathfinder.load_nvidia_dynamic_lib = load
try:
    find_toolchain()
except ToolchainError:
    pass
else:
    raise SystemExit("NVRTC was found")

artifact = build(RmsNormSpec(torch.bfloat16, torch.bfloat16, 64, 16, True).source(), CompileTarget("sm_80"), default_cache())
assert artifact.cubin == Path(sys.argv[1]).read_bytes()
assert not default_cache().root.exists()
(status,) = [status for status in registry().statuses if "kernels" in status.entry_point]
assert status.error is None and status.distribution.startswith("fi-cuda-kernels-sm80 "), status
try:
    build(RmsNormSpec(torch.bfloat16, torch.bfloat16, 72, 16, True).source(), CompileTarget("sm_80"), default_cache())
except ToolchainError as error:
    assert "libnvrtc was not found" in str(error), error
else:
    raise SystemExit("a kernel that the wheel does not hold was found")
"""


def test_wheel_serves_a_machine_without_a_compiler_or_a_writable_cache(tmp_path):
    source = RmsNormSpec(torch.bfloat16, torch.bfloat16, 64, 16, True).source()
    kernels = compiled_into(tmp_path / "out", source).folder
    with zipfile.ZipFile(pack_wheel(kernels, TARGET.arch, tmp_path / "dist")) as archive:
        archive.extractall(tmp_path / "site")
    (cubin,) = kernels.glob(f"*/{CUBIN}")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *filter(None, sys.path)]),
        "FI_CACHE_DIR": "/proc/no-folder-can-be-made-here",
    }
    subprocess.run([sys.executable, "-c", SCRIPT, str(cubin)], env=environment, check=True, timeout=120)
