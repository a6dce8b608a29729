"""Writes <name>.dist-info folders of the adapters, so that engines find their plugins from PYTHONPATH without an installation.

usage: python dist_info.py FOLDER      (then put FOLDER on PYTHONPATH)
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = ("integrations/vllm", "integrations/sglang")


def write(adapter: Path, folder: Path) -> Path:
    """One folder from the adapter's pyproject.toml."""
    project = tomllib.loads((adapter / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    target = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    target.mkdir(parents=True, exist_ok=True)
    (target / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{point} = {where}" for point, where in points.items()), ""]
    (target / "entry_points.txt").write_text("\n".join(lines))
    return target


def main() -> None:
    for adapter in ADAPTERS:
        print(write(ROOT / adapter, Path(sys.argv[1])))


if __name__ == "__main__":
    main()
