"""Validation and normalisation of SamplingParams."""

import copy
import dataclasses
import pickle

import pytest
from fi_core import ArgumentError
from fi_sampling import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("temperature", 1e39),
        ("temperature", 10**400),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2),
        ("typical_p", 0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-46),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("logit_bias", {-1: 0.5}),
        ("logit_bias", {3: 101}),
        ("logit_bias", [3]),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", (-1,)),
        ("allowed_token_ids", 4),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop", None),
        ("stop", b"end"),
        ("stop_token_ids", ("a",)),
        ("stop_token_ids", b"a"),
        ("stop_token_ids", {3: 1.0}),
        ("seed", 2**63),
        ("seed", 0.5),
        ("n", 0),
        ("n", 2**31),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", -1),
        ("ignore_eos", 1),
    ],
)
def test_bad_values_name_the_field(field, value):
    with pytest.raises(ArgumentError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.argument == field


def test_values_are_normalised_and_frozen():
    bias = {5: 1.5}
    params = SamplingParams(stop="end", stop_token_ids=[3, 4], allowed_token_ids={7}, logit_bias=bias, max_tokens=None)
    bias[6] = 2.0
    assert params.stop == ("end",) and params.stop_token_ids == (3, 4) and params.allowed_token_ids == (7,)
    assert dict(params.logit_bias) == {5: 1.5}
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3
    with pytest.raises(TypeError):
        params.logit_bias[1] = 0.0
    assert hash(params) == hash(dataclasses.replace(params))


@pytest.mark.parametrize("passed_on", [copy.copy, copy.deepcopy, lambda params: pickle.loads(pickle.dumps(params))])
def test_parameters_can_be_copied_and_sent_to_other_processes(passed_on):
    params = SamplingParams(top_k=3, logit_bias={5: 1.5}, stop="end", seed=4, max_tokens=None)
    copied = passed_on(params)
    assert copied == params and hash(copied) == hash(params)
    with pytest.raises(TypeError):
        copied.logit_bias[5] = 0.0


def test_ignore_eos_makes_end_tokens_ordinary():
    assert SamplingParams(stop_token_ids=(3,)).stop_tokens({1, 2}) == {1, 2, 3}
    assert SamplingParams(stop_token_ids=(3,), ignore_eos=True).stop_tokens({1, 2}) == {3}
