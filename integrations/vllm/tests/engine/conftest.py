"""A configuration of vLLM that its layers can be made under, and settings that are read again in each test."""

import pytest
from fi_core.settings import settings
from vllm.config import VllmConfig, set_current_vllm_config


@pytest.fixture(autouse=True)
def _configuration():
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def environment(monkeypatch):
    """Sets FI_* variables for a test."""

    def change(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        settings.cache_clear()

    yield change
    monkeypatch.undo()
    settings.cache_clear()
