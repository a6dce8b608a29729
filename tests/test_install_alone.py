"""A package installed alone works: pip brings what it needs of ours out of the checkout, and nothing else of ours."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

NEEDS = {
    "packages/fi-core": [],
    "packages/fi-scheduler": ["fi-core"],
    "packages/fi-sampling": ["fi-core"],
    "packages/fi-triton": ["fi-core", "fi-scheduler"],
    "packages/fi-cuda": ["fi-core", "fi-scheduler"],
    "integrations/engine": ["fi-core", "fi-sampling", "fi-scheduler"],
    "integrations/adapters": ["fi-core"],
    "integrations/vllm": ["fi-adapters", "fi-core"],
    "integrations/sglang": ["fi-adapters", "fi-core"],
}
"""What each package needs of ours."""

ELSEWHERE = {"fi-adapters": "integrations/adapters"}
"""Where a package lies that is not in packages/ under its own name."""

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


def install(folder: Path, package: str) -> Path:
    """A virtual environment into which pip installed ``package`` from the checkout, with neither an index nor wheels.

    Third-party packages (torch, triton, pip, hatchling) are this environment's, linked, so that pip finds them installed.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=100)
    python = folder / "bin" / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    share_third_party(Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()))
    options = ["--isolated", "--no-index", "--no-build-isolation", "--no-cache-dir"]
    command = [str(python), "-m", "pip", "install", *options, package]
    done = subprocess.run(command, env=plain(), cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return python


def plain(**variables: str) -> dict[str, str]:
    """The environment without what would change the packages that are found or built, and with ``variables``."""
    unwanted = ("PYTHONPATH", "TRITON_INTERPRET", "FI_SIBLINGS")
    return {**{name: value for name, value in os.environ.items() if name not in unwanted}, **variables}


def share_third_party(purelib: Path) -> None:
    """Link every installed third-party top-level entry into ``purelib``; nothing of ours and no .pth file."""
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        ours = entry.name.startswith(("fi_", "_fi_", "__editable__")) or entry.suffix == ".pth"
        if not ours and not (purelib / entry.name).exists():
            (purelib / entry.name).symlink_to(entry)


def use(python: Path, backend: str, **variables: str) -> dict:
    done = subprocess.run(
        [str(python), "-c", USE, backend],
        env=plain(**variables),
        cwd=python.parent,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def requirements(folder: str, **variables: str) -> list[Requirement]:
    """What the metadata of the package in ``folder`` requires when it is built with ``variables``."""
    command = [sys.executable, "-m", "hatchling", "metadata"]
    done = subprocess.run(
        command, env=plain(**variables), cwd=ROOT / folder, capture_output=True, text=True, timeout=100, check=True
    )
    return [Requirement(text) for text in json.loads(done.stdout)["dependencies"]]


@pytest.mark.parametrize("folder", NEEDS)
def test_requirements_lie_in_the_checkout(folder):
    found = {item.name: item.url for item in requirements(folder) if item.name.startswith("fi-")}
    assert found == {name: (ROOT / ELSEWHERE.get(name, f"packages/{name}")).as_uri() for name in NEEDS[folder]}


@pytest.mark.parametrize("folder", NEEDS)
@pytest.mark.parametrize("text", ["", "==0.1.0"], ids=["editable", "published"])
def test_requirements_without_a_path(folder, text):
    found = requirements(folder, FI_SIBLINGS=text)
    assert [item for item in found if item.url] == []
    assert sorted(str(item) for item in found if item.name.startswith("fi-")) == [name + text for name in NEEDS[folder]]


def test_every_package_is_listed():
    folders = [
        path.parent for pattern in ("packages", "integrations") for path in ROOT.glob(f"{pattern}/*/pyproject.toml")
    ]
    assert sorted(str(folder.relative_to(ROOT)) for folder in folders) == sorted(NEEDS)


def test_reference_alone(tmp_path):
    found = use(install(tmp_path / "venv", "packages/fi-core"), "reference")
    assert found["ours"] == ["fi-core"]
    assert found["backends"] == ["reference"]
    assert str(tmp_path) in found["from"]


def test_triton_alone(tmp_path):
    found = use(install(tmp_path / "venv", "packages/fi-triton"), "triton", TRITON_INTERPRET="1")
    assert found["ours"] == ["fi-core", "fi-scheduler", "fi-triton"]
    assert sorted(found["backends"]) == ["reference", "triton"]
    assert str(tmp_path) in found["from"]
