"""What importing fi_core does and does not do."""

import subprocess
import sys

import fi_core as fi


def _run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    return done.stdout


def test_import_adds_at_most_a_tenth_of_a_second_to_torch() -> None:
    script = "import time, torch; start = time.process_time(); import fi_core; print(time.process_time() - start)"
    assert min(float(_run(script)) for _ in range(3)) <= 0.1


def test_import_loads_no_backend_and_touches_no_gpu() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import fi_core; new = set(sys.modules) - before\n"
        "found = {name for name in new if name.startswith('fi_') and not name.startswith('fi_core')}\n"
        "found |= {name for name in new if name.startswith(('fi_core.reference.', 'fi_core.cli', 'fi_core.bench'))}\n"
        "found |= {'triton', 'pytest', 'cuda'} & new\n"
        "print(found, torch.cuda.is_initialized())"
    )
    assert _run(script).strip() == "set() False"


def test_discovery_touches_no_gpu() -> None:
    script = "import torch, fi_core; fi_core.backends(); print(torch.cuda.is_initialized())"
    assert _run(script).strip() == "False"


def test_public_names_exist_and_are_sorted() -> None:
    assert [name for name in fi.__all__ if not hasattr(fi, name)] == []
    assert len(set(fi.__all__)) == len(fi.__all__)
    for name in ("plan", "rope", "explain"):
        assert callable(getattr(fi, name)), f"fi_core.{name} must be the function, not the module of that name"


def test_every_public_function_is_documented() -> None:
    undocumented = [name for name in fi.__all__ if callable(getattr(fi, name)) and not getattr(fi, name).__doc__]
    assert undocumented == []
