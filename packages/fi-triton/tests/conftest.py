"""Kernels run on the GPU when there is one, else in Triton's interpreter, which must be chosen before they are imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _prepared() -> None:
    from fi_triton.interpreter import prepare_interpreter

    prepare_interpreter()


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tests of this package run their kernels."""
    return "cuda" if torch.cuda.is_available() else "cpu"
