"""Another vLLM than the one that the package is written for is refused with what to install; its entry points exist."""

import importlib
import tomllib
from pathlib import Path

import fi_vllm
import pytest
from fi_adapters.versions import EngineVersionError

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("found", ["0.22.0", "0.22.1", "0.22.1+cu130", "0.22.2.dev3"])
def test_served(found):
    fi_vllm.ENGINE.check_version(found)


@pytest.mark.parametrize("found", ["0.21.9", "0.23.0", "0.2.2", "1.22.0", None])
def test_refused(found):
    with pytest.raises(EngineVersionError, match=r"pip install 'vllm==0\.22\.1'") as refused:
        fi_vllm.ENGINE.check_version(found)
    assert (found or "not installed") in str(refused.value)


def test_entry_points_lead_to_functions():
    for target in PROJECT["entry-points"]["vllm.general_plugins"].values():
        module, name = target.split(":")
        assert callable(getattr(importlib.import_module(module), name))
    assert PROJECT["version"] == fi_vllm.__version__
