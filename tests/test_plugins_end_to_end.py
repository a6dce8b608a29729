"""Plugins found through real dist-info folders in a fresh process: what is wrong with one is named, the others work."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PLUGIN = """
from fi_core.contract import KernelEntry
from fi_core.hookspecs import BackendInfo, hookimpl

@hookimpl
def fi_backend():
    return BackendInfo({name!r}, "1.0", "a plugin of a test", priority=10)
"""

REPORT = """
import json, sys
import fi_core
from fi_core.registry import registry
statuses = {f"{item.distribution}:{item.entry_point}": item.error for item in registry().statuses}
print(json.dumps({"statuses": statuses, "backends": sorted(registry().backends)}))
"""

RMSNORM = """
import torch, fi_core
x = torch.ones(2, 8)
print(fi_core.rmsnorm(x, torch.ones(8), 0.0).sum().item())
"""


def add_plugin(folder: Path, name: str, text: str) -> None:
    """A module plugin_NAME and the dist-info folder that declares it under the entry point NAME."""
    (folder / f"plugin_{name}.py").write_text(text)
    information = folder / f"dist_{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dist-{name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[fi]\n{name} = plugin_{name}\n")


def run(folder: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    paths = [str(folder), str(ROOT / "packages/dist-info"), *map(str, ROOT.glob("packages/*/src"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def report(folder: Path, **variables: str) -> dict:
    done = run(folder, REPORT, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_plugin_is_found_without_touching_our_code(tmp_path):
    add_plugin(tmp_path, "foreign", PLUGIN.format(name="foreign"))
    found = report(tmp_path)
    assert found["statuses"]["dist-foreign 1.0:foreign"] is None
    assert {"foreign", "reference"} <= set(found["backends"])


def test_of_two_plugins_with_one_name_the_second_is_refused_by_name(tmp_path):
    add_plugin(tmp_path, "first", PLUGIN.format(name="same"))
    add_plugin(tmp_path, "second", PLUGIN.format(name="same"))
    found = report(tmp_path)
    assert found["statuses"]["dist-first 1.0:first"] is None
    error = found["statuses"]["dist-second 1.0:second"]
    assert "'second'" in error
    assert "'same' is taken" in error
    assert {"same", "reference"} <= set(found["backends"])


def test_plugin_that_raises_at_import_is_reported_and_breaks_nothing(tmp_path):
    add_plugin(tmp_path, "broken", "raise OSError('no such accelerator')\n")
    error = report(tmp_path)["statuses"]["dist-broken 1.0:broken"]
    assert error == "OSError: no such accelerator"
    done = run(tmp_path, RMSNORM)
    assert (done.returncode, done.stdout.strip()) == (0, "16.0"), done.stderr


def test_plugin_whose_hook_raises_or_is_misspelt_is_reported_and_leaves_nothing(tmp_path):
    raising = (
        PLUGIN.format(name="half") + "@hookimpl\ndef fi_register_kernels(registry):\n    raise KeyError('rules')\n"
    )
    unknown = PLUGIN.format(name="unknown") + "@hookimpl\ndef fi_regster_kernels(registry):\n    pass\n"
    add_plugin(tmp_path, "half", raising)
    add_plugin(tmp_path, "unknown", unknown)
    found = report(tmp_path)
    assert "rules" in found["statuses"]["dist-half 1.0:half"]
    assert "fi_regster_kernels" in found["statuses"]["dist-unknown 1.0:unknown"]
    assert "reference" in found["backends"]
    assert not {"half", "unknown"} & set(found["backends"])


def test_unknown_backend_names_those_installed_and_those_that_failed(tmp_path):
    add_plugin(tmp_path, "broken", "raise OSError('no such accelerator')\n")
    for script, variables in (
        (RMSNORM, {"FI_BACKEND": "brokn"}),
        ("import fi_core\nwith fi_core.use(backend='brokn'):\n  pass", {}),
    ):
        done = run(tmp_path, script, **variables)
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert "UnknownBackendError: unknown backend 'brokn'" in last
        assert "'reference'" in last
        assert "broken (OSError: no such accelerator)" in last


def test_disabled_plugin_is_not_imported(tmp_path):
    add_plugin(tmp_path, "broken", "raise OSError('no such accelerator')\n")
    statuses = report(tmp_path, FI_DISABLE_PLUGINS="broken")["statuses"]
    assert "dist-broken 1.0:broken" not in statuses


def test_doctor_lists_the_broken_plugin_with_its_reason(tmp_path):
    add_plugin(tmp_path, "broken", "raise OSError('no such accelerator')\n")
    done = run(tmp_path, "import sys\nfrom fi_core.cli import main\nsys.argv = ['fi', 'doctor']\nsys.exit(main())")
    text = done.stdout + done.stderr
    assert "broken" in text, text
    assert "no such accelerator" in text, text
    assert "reference" in text, text
