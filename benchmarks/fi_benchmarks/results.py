"""Result files: a JSON list of rows a group, one row a line, each naming the device, versions and commit it ran on."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .runner import Row

Rows = list[dict[str, Any]]
_DISTRIBUTIONS = ("torch", "triton", "cuda-core", "fi-core", "fi-cuda", "fi-triton")
_ROOT = Path(__file__).resolve().parents[2]


def circumstances(device: torch.device, peers: Mapping[str, str], given_commit: str | None = None) -> dict[str, Any]:
    """What every row of a run shares: device, versions (of the peers found too) and commit (given, or asked of git)."""
    versions = {"python": platform.python_version(), **peers}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": name,
        "versions": " ".join(f"{key}={value}" for key, value in sorted(versions.items())),
        "commit": given_commit or commit(),
    }


def commit() -> str:
    """The source tree's commit, "+" added where files differ from it; "unknown" where there is no history or no git."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    command = [git, "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    described = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"


def write(folder: Path, group: str, rows: Sequence[Row], shared: Mapping[str, Any]) -> Path:
    """Write ``rows`` to FOLDER/GROUP.json, in place of earlier rows of their cases."""
    path = folder / f"{group}.json"
    cases = {row.case for row in rows}
    kept = [row for row in (load_file(path) if path.exists() else []) if row["case"] not in cases]
    new = [{**row.as_json(), **shared} for row in rows]
    lines = [json.dumps(row, separators=(",", ":"), ensure_ascii=False) for row in kept + new]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return path


def load_file(path: Path) -> Rows:
    """The rows of one file; ValueError names a file that is no list of rows."""
    rows = json.loads(path.read_text())
    needed = {"op", "group", "case", "impl", "kind"}
    if not isinstance(rows, list) or any(not isinstance(row, dict) or needed - set(row) for row in rows):
        raise ValueError(f"{path}: not a list of benchmark rows ({', '.join(sorted(needed))})")
    return rows


def load(paths: Iterable[Path]) -> Rows:
    """The rows of files, and of every JSON file of folders that is one of ours."""
    rows: Rows = []
    for path in paths:
        if not path.is_dir():
            rows += load_file(path)
            continue
        for file in sorted(path.glob("*.json")):
            found = json.loads(file.read_text())
            if isinstance(found, list) and all(isinstance(row, dict) and "kind" in row for row in found):
                rows += load_file(file)
    return rows
