"""The example of a CUDA plugin: found through its entry point, compiled and cached by our pipeline, correct on a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "examples/fi-example-cuda-plugin"
MAX_LINES, MAX_HEADER_LINES = 120, 60
BACKEND = "example_cuda"

BUILD = """
import json, torch
from fi_core.hookspecs import hookimpl
from fi_core.registry import registry
from fi_cuda.compile import build, default_cache
from fi_cuda.source import CompileTarget
from fi_example_cuda_plugin.norm import WarpRmsNormSpec

events = []

class Observer:
    @hookimpl
    def fi_on_compile(self, event):
        events.append(event.origin)

registry().manager.register(Observer())
found = []
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for width in (128, 512):
        source = WarpRmsNormSpec(dtype, width).source()
        artifact = build(source, CompileTarget("sm_90a"), default_cache())
        folders = {str(path.parents[len(name.split("/")) - 1]) for name, path in source.headers().items()}
        found.append({"name": artifact.name, "is_elf": artifact.cubin.startswith(b"\\x7fELF"),
                      "resources": vars(artifact.resources), "folders": sorted(folders)})
print(json.dumps({"artifacts": found, "origins": events, "cached": default_cache().names()}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The plugin's wheel, unpacked: modules, header and dist-info as pip would install them."""
    built, folder = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)]
    subprocess.run(command, cwd=PLUGIN, capture_output=True, text=True, timeout=100, check=True)
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def environment(installed, tmp_path_factory):
    """The installed plugin beside this source tree, and a cache of its own."""
    paths = [installed, ROOT / "packages/dist-info", *ROOT.glob("packages/*/src")]
    cache = str(tmp_path_factory.mktemp("cache") / "fi")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "FI_CACHE_DIR": cache}


def python(environment, *arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


def load_gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks/gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def built(environment):
    done = python(environment, "-c", BUILD)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_is_found_and_chosen_for_what_it_declares(environment):
    explain = ("-m", "fi_core", "explain", "--device", "cuda:sm_90")
    done = python(environment, *explain, "--backend", BACKEND, "rmsnorm", "hidden_size=128")
    assert done.returncode == 0, done.stderr
    assert "chosen: example_cuda.warp_rmsnorm" in done.stdout
    done = python(environment, *explain, "rmsnorm", "hidden_size=1000")
    assert done.returncode == 0, done.stderr
    assert "chosen: cuda.rmsnorm" in done.stdout
    assert "example_cuda.warp_rmsnorm: hidden_size: 1000 is not 32 to 512, multiples of 32" in done.stdout


def test_our_pipeline_compiles_it_without_a_gpu_and_caches_it(environment, installed):
    first = built(environment)
    assert len({item["name"] for item in first["artifacts"]}) == 6
    assert first["origins"] == ["nvrtc"] * 6
    for item in first["artifacts"]:
        assert item["is_elf"] and item["name"].startswith("warp_rmsnorm-")
        resources = item["resources"]
        assert resources["spill_store_bytes"] == resources["spill_load_bytes"] == resources["stack_bytes"] == 0, item
        assert resources["shared_bytes"] == 0 and resources["num_registers"] <= 80, item
        assert item["folders"] == sorted(
            [
                str(installed / "fi_example_cuda_plugin/include"),
                str(ROOT / "packages/fi-cuda/src/fi_cuda/include"),
            ]
        )
    second = built(environment)
    assert second["origins"] == ["cache"] * 6
    assert second["artifacts"] == first["artifacts"]
    assert set(second["cached"]) == {item["name"] for item in first["artifacts"]}


def test_it_is_short():
    files = [PLUGIN / "pyproject.toml", *PLUGIN.glob("src/**/*.py")]
    assert len(files) == 3
    assert sum(len(path.read_text().splitlines()) for path in files) < MAX_LINES
    (header,) = PLUGIN.glob("src/**/*.cuh")
    assert len(header.read_text().splitlines()) < MAX_HEADER_LINES


@pytest.mark.gpu
def test_it_passes_the_conformance_kit(tmp_path):
    """From its sources, with what installing it would write: a GPU machine need not have what builds a wheel."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    load_gpu_check().write_dist_info(tmp_path, project)
    paths = [tmp_path, PLUGIN / "src", ROOT / "packages/dist-info", *ROOT.glob("packages/*/src")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "FI_CACHE_DIR": str(tmp_path / "fi")}
    report = tmp_path / "report.json"
    arguments = ("--backend", BACKEND, "--op", "rmsnorm", "--device", "cuda", "--json", report)
    done = python(environment, "-m", "fi_core", "conformance", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [row["outcome"] for row in json.loads(report.read_text())["results"]]
    assert outcomes.count("passed") >= 10
    assert "failed" not in outcomes
