"""The README's support matrix is what the backends of the repository declare."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fi_core.support_matrix import update_text

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.fixture(scope="module")
def matrix():
    """From a process of its own: Triton's interpreter, if this one uses it, changes what the backend declares."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fi_core", "matrix"]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=100, check=True
    ).stdout.strip()


def test_readme_is_up_to_date(matrix):
    text = README.read_text()
    assert update_text(text, matrix) == text, "run: fi matrix --write README.md"


def test_matrix_has_a_column_for_each_backend_of_the_repository(matrix):
    header = matrix.splitlines()[0]
    assert all(name in header for name in ("reference", "triton", "cuda"))
