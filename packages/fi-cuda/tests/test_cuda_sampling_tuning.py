"""What a hook chooses for the sampling kernels is what they are compiled for, and names that are none are errors."""

import pytest
import torch
from fi_core.errors import ArgumentError
from fi_core.hookspecs import hookimpl
from fi_core.registry import registry
from fi_core.sampling import FilterParams
from fi_cuda.kernels.sampling import filter_logits as filter_module
from fi_cuda.kernels.sampling import sample as sample_module
from fi_cuda.kernels.sampling import tuning as tuning_module
from fi_cuda.kernels.sampling.tuning import BUILT_IN, SamplingTuning, sampling_tuning_for

pytestmark = pytest.mark.timeout(60)
CPU = torch.device("cpu")


class Override:
    def __init__(self, given):
        self.given = given

    @hookimpl
    def fi_tuning(self, op):
        return self.given if op == "sampling" else None


@pytest.fixture
def override():
    plugins = []

    def add(given):
        plugins.append(Override(given))
        registry().manager.register(plugins[-1])
        tuning_module._asked.cache_clear()

    yield add
    for plugin in plugins:
        registry().manager.unregister(plugin)
    tuning_module._asked.cache_clear()


def test_without_a_hook_it_is_what_is_built_in():
    assert sampling_tuning_for(CPU) == BUILT_IN


def test_a_hook_chooses_what_is_compiled(override, recorder, monkeypatch):
    override({"bracket": True, "double_sums": True, "whole_rounds": True})
    assert sampling_tuning_for(CPU) == SamplingTuning(True, True, True)
    for module in (sample_module, filter_module):
        module._bound.cache_clear()
        monkeypatch.setattr(module, "kernel_for", recorder.kernel_for)
    logits, column = torch.zeros((2, 32000)), torch.full((2,), 0.9)
    filter_module.filter_logits(logits, FilterParams(top_p=column), "probs", torch.empty_like(logits))
    filter_module._bound.cache_clear()
    (spec,) = recorder.specs
    assert spec.brackets and spec.bracket and spec.double_sums and spec.warp_tokens % 128 == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [({"brackets": True}, "fi_tuning: expected names among"), ({"bracket": 1}, "tuning.bracket: expected a bool")],
)
def test_bad_tuning_is_named(override, given, message):
    override(given)
    with pytest.raises(ArgumentError, match=message):
        sampling_tuning_for(CPU)
