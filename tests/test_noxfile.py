"""What the nox sessions run exists: modules called with -m can be executed, scripts and test folders are there."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATH_ENDINGS = (".py", "/tests", "tests")
INSTALLED_BY_ITS_SESSION = {"ruff", "mypy"}


def commands(source: str) -> Iterator[list[str]]:
    """The constant texts of each call of ``run`` and ``pytest``, in order."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("run", "pytest"):
            yield [item.value for item in node.args if isinstance(item, ast.Constant) and isinstance(item.value, str)]


def can_be_executed(module: str) -> bool:
    """Whether ``python -m module`` finds code to run."""
    found = importlib.util.find_spec(module)
    if found is not None and found.submodule_search_locations is not None:
        found = importlib.util.find_spec(f"{module}.__main__")
    return found is not None


def test_modules_and_files_of_every_session_exist():
    found = list(commands((ROOT / "noxfile.py").read_text()))
    modules = [texts[texts.index("-m") + 1] for texts in found if "-m" in texts]
    files = [text for texts in found for text in texts if text.endswith(PATH_ENDINGS)]
    assert {"pytest", "fi_triton.aot"} <= set(modules) and len(files) >= 4
    here = [module for module in modules if module not in INSTALLED_BY_ITS_SESSION]
    assert [module for module in here if not can_be_executed(module)] == []
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_a_package_without_a_main_cannot_be_executed():
    assert can_be_executed("fi_core") and not can_be_executed("fi_core.cli") and not can_be_executed("fi_no_such_thing")
