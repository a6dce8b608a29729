"""The example plugin is found through its entry point alone, passes the conformance kit, and stays short."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "examples/fi-example-plugin"
MAX_LINES = 125

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The plugin's source and the dist-info that installing it would write; the interpreter where there is no GPU."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    folder = tmp_path_factory.mktemp("installed")
    information = folder / f"fi_example_plugin-{project['version']}.dist-info"
    information.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (information / "METADATA").write_text(metadata)
    lines = [f"{name} = {value}" for name, value in project["entry-points"]["fi"].items()]
    (information / "entry_points.txt").write_text("\n".join(["[fi]", *lines, ""]))
    paths = [folder, PLUGIN / "src", ROOT / "packages/dist-info", *ROOT.glob("packages/*/src")]
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **interpret}


def fi(environment, *arguments):
    command = [sys.executable, "-m", "fi_core", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


def test_it_is_found_and_chosen_for_what_it_declares(environment):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = ["--device", device, "attention", "dtype=fp16", "kv_format=fp16", "head_dim=64", "head_dim_vo=64"]
    done = fi(environment, "explain", "--backend", "example", *wanted)
    assert done.returncode == 0, done.stderr
    assert "chosen: example.decode_d64" in done.stdout
    done = fi(environment, "explain", *wanted, "head_dim=128")
    assert done.returncode == 0, done.stderr
    assert "example.decode_d64: head_dim: 128 is not one of 64" in done.stdout


def test_it_passes_the_conformance_kit(environment, tmp_path):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = tmp_path / "report.json"
    done = fi(
        environment, "conformance", "--backend", "example", "--op", "attention", "--device", device, "--json", report
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [row["outcome"] for row in json.loads(report.read_text())["results"]]
    assert outcomes.count("passed") >= 2
    assert "failed" not in outcomes


def test_it_is_short():
    files = [PLUGIN / "pyproject.toml", *PLUGIN.glob("src/**/*.py")]
    assert len(files) == 3
    assert sum(len(path.read_text().splitlines()) for path in files) < MAX_LINES
