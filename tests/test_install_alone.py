"""A backend installed alone works: only it and what it needs are there, in an environment of its own."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = "fi-"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

USE = """
import importlib.metadata, json, sys
import torch, fi_core
spec = fi_core.AttentionSpec(4, 2, 64, dtype=torch.float32, page_size=16)
batch = fi_core.Batch(torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([3, 20], dtype=torch.int32),
                      torch.tensor([[0, 0], [1, 2]], dtype=torch.int32))
kv = fi_core.KVCache(torch.randn(3, 16, 2, 64), torch.ones(3, 16, 2, 64))
plan = fi_core.plan(spec, max_batch=2, max_q_tokens=2, max_q_len=1, max_kv_len=32, device="cpu", backend=sys.argv[1])
plan.update(batch)
out = fi_core.attention(torch.randn(2, 4, 64), kv, plan)
torch.testing.assert_close(out, torch.ones(2, 4, 64))
names = sorted({item.metadata["Name"] for item in importlib.metadata.distributions() if item.metadata["Name"]})
backends = [item.info.name for item in fi_core.backends() if item.info]
ours = [name for name in names if name.startswith("fi-")]
print(json.dumps({"ours": ours, "from": fi_core.__file__, "backends": backends}))
"""


def install(folder: Path, *packages: str) -> Path:
    """A virtual environment that holds wheels of ``packages`` and sees third-party ones (torch, triton) of this one.

    Sharing goes through a .pth file with the folder's third-party entries, since ours are installed editable here.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=100)
    python = folder / "bin" / "python"
    purelib = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    wheels = folder / "wheels"
    pip = [sys.executable, "-m", "pip", "--quiet"]
    sources = [str(ROOT / "packages" / name) for name in packages]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), *sources], check=True, timeout=400
    )
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", purelib, *map(str, wheels.glob("*.whl"))], check=True, timeout=200
    )
    share_third_party(Path(purelib))
    return python


def share_third_party(purelib: Path) -> None:
    """Link every installed third-party top-level entry into ``purelib``; nothing of ours and no .pth file."""
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        ours = entry.name.startswith(("fi_", "_fi_", "__editable__")) or entry.suffix == ".pth"
        if not ours and not (purelib / entry.name).exists():
            (purelib / entry.name).symlink_to(entry)


def use(python: Path, backend: str, **variables: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [str(python), "-c", USE, backend],
        env={**environment, **variables},
        cwd=python.parent,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def requirements_of_ours(package: str) -> set[str]:
    """What pip would install of ours for ``package``, by the metadata of the package sources."""
    import tomllib

    project = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())["project"]
    direct = {item.split("=")[0].split(">")[0].strip() for item in project["dependencies"] if item.startswith(OURS)}
    return direct.union(*(requirements_of_ours(name) for name in direct))


def test_reference_alone(tmp_path):
    assert requirements_of_ours("fi-core") == set()
    found = use(install(tmp_path / "venv", "fi-core"), "reference")
    assert found["ours"] == ["fi-core"]
    assert found["backends"] == ["reference"]
    assert str(tmp_path) in found["from"]


def test_triton_alone(tmp_path):
    assert requirements_of_ours("fi-triton") == {"fi-core", "fi-scheduler"}
    python = install(tmp_path / "venv", "fi-core", "fi-scheduler", "fi-triton")
    found = use(python, "triton", TRITON_INTERPRET="1")
    assert found["ours"] == ["fi-core", "fi-scheduler", "fi-triton"]
    assert sorted(found["backends"]) == ["reference", "triton"]
    assert str(tmp_path) in found["from"]
