"""Kernels run on the GPU when there is one, else in Triton's interpreter, which must be chosen before they are imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the interpreter itself have nothing to test where kernels are compiled."""
    interpreted = [item for item in items if item.get_closest_marker("interpreter")]
    if interpreted and torch.cuda.is_available():
        config.hook.pytest_deselected(items=interpreted)
        items[:] = [item for item in items if item not in interpreted]


@pytest.fixture(scope="session", autouse=True)
def _prepared() -> None:
    from fi_triton.interpreter import prepare_interpreter

    prepare_interpreter()


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tests of this package run their kernels."""
    return "cuda" if torch.cuda.is_available() else "cpu"
