"""Imports and #includes point downward only: core <- scheduler <- backends, core <- sampling, integrations on top."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ALLOWED = {
    "fi_core": set(),
    "fi_scheduler": {"fi_core"},
    "fi_sampling": {"fi_core"},
    "fi_cuda": {"fi_core", "fi_scheduler"},
    "fi_triton": {"fi_core", "fi_scheduler"},
}
"""What each package's sources may import of ours, besides themselves. What is not listed here is on top: it may import
every package, and no package may import it."""

ABOVE = {
    "fi_engine",
    "fi_adapters",
    "fi_vllm",
    "fi_sglang",
    "benchmarks",
    "fi_benchmarks",
    "examples",
    "integrations",
    "fi_example_plugin",
    "fi_example_cuda_plugin",
}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
NATIVE = {".h", ".hpp", ".cuh", ".cu", ".cpp"}


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Absolute names that a module imports, import_module("...") with a constant start included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            text = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            is_constant = isinstance(text, ast.Constant) and isinstance(text.value, str)
            if name in ("import_module", "__import__") and is_constant:
                yield text.value


def owner_of_headers(packages: Path) -> dict[str, str]:
    """Include path, as device code spells it, -> the package that ships it."""
    owners = {}
    for name in ALLOWED:
        for folder in packages.glob(f"*/src/{name}/include"):
            owners |= {str(path.relative_to(folder)): name for path in folder.rglob("*") if path.suffix in NATIVE}
    return owners


def violations(root: Path) -> list[str]:
    """Every edge of the tree under ``root`` that ``ALLOWED`` does not have, as "file: what"."""
    found = []
    headers = owner_of_headers(root / "packages")
    for package, allowed in ALLOWED.items():
        for path in sorted(root.glob(f"packages/*/src/{package}/**/*")):
            if path.suffix == ".py":
                names = {name.split(".")[0] for name in imported_modules(ast.parse(path.read_text()))}
                edges = (names & (set(ALLOWED) | ABOVE)) - allowed - {package}
                found += [f"{path.relative_to(root)}: imports {name}" for name in sorted(edges)]
            elif path.suffix in NATIVE:
                found += [f"{path.relative_to(root)}: {text}" for text in include_violations(path, package, headers)]
    return found


def include_violations(path: Path, package: str, headers: dict[str, str]) -> list[str]:
    found = []
    for quote, name in INCLUDE.findall(path.read_text()):
        if name.startswith("fi/") and name not in headers:
            found.append(f"includes {name}, which no package ships")
        elif name in headers and headers[name] not in ALLOWED[package] | {package}:
            found.append(f"includes {name} of {headers[name]}")
        elif quote == '"' and not name.startswith("fi/"):
            found.append(f'includes "{name}": headers of ours are included by their path from an include folder')
    return found


def test_no_edge_points_up_or_sideways():
    assert violations(ROOT) == []


def test_every_package_is_looked_at():
    folders = {path.name for path in ROOT.glob("packages/*/src/*") if path.is_dir() and not path.name.startswith(".")}
    assert folders == set(ALLOWED)
    for package in ALLOWED:
        assert list(ROOT.glob(f"packages/*/src/{package}/*.py")), package


def test_each_kind_of_wrong_edge_is_found(tmp_path):
    files = {
        "fi-core/src/fi_core/up.py": "from fi_scheduler import pages\n",
        "fi-core/src/fi_core/late.py": "def f():\n    importlib.import_module(f'fi_triton.{1}')\n",
        "fi-core/src/fi_core/fine.py": "from . import up\nimport fi_core.late\nimport fi_corelike\n",
        "fi-triton/src/fi_triton/sideways.py": "if True:\n    import fi_cuda.toolchain as t\n",
        "fi-triton/src/fi_triton/fine.py": "import fi_core\nfrom fi_scheduler.pages import Pool\n",
        "fi-sampling/src/fi_sampling/top.py": "from fi_engine import Engine\n",
        "fi-cuda/src/fi_cuda/include/fi/kv/a.cuh": "#include <fi/scheduler/partition.cuh>\n#include <cuda_bf16.h>\n",
        "fi-cuda/src/fi_cuda/include/fi/kv/b.cuh": '#include "a.cuh"\n#include <fi/absent.cuh>\n',
        "fi-scheduler/src/fi_scheduler/include/fi/scheduler/partition.cuh": "#include <fi/kv/a.cuh>\n",
    }
    for name, text in files.items():
        path = tmp_path / "packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert sorted(line.removeprefix("packages/") for line in violations(tmp_path)) == [
        "fi-core/src/fi_core/late.py: imports fi_triton",
        "fi-core/src/fi_core/up.py: imports fi_scheduler",
        'fi-cuda/src/fi_cuda/include/fi/kv/b.cuh: includes "a.cuh": '
        "headers of ours are included by their path from an include folder",
        "fi-cuda/src/fi_cuda/include/fi/kv/b.cuh: includes fi/absent.cuh, which no package ships",
        "fi-sampling/src/fi_sampling/top.py: imports fi_engine",
        "fi-scheduler/src/fi_scheduler/include/fi/scheduler/partition.cuh: includes fi/kv/a.cuh of fi_cuda",
        "fi-triton/src/fi_triton/sideways.py: imports fi_cuda",
    ]
