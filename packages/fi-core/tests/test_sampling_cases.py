"""The sampling cases run on the reference, have safe and lively inputs, and catch wrong kernels."""

from dataclasses import replace

import pytest
import torch
from fi_core.conformance.compare import compare
from fi_core.ops import (
    filter_logits,
    logprobs,
    penalize_logits,
    record_tokens,
    sample,
    top_k,
    verify_chain,
    verify_tree,
)
from fi_core.reference import sampling as reference
from fi_core.reference.sampling import draw
from fi_core.reference.sampling.masses import Weights, to_mass

OPERATIONS = {
    module.OPERATION.name: module.OPERATION
    for module in (filter_logits, logprobs, penalize_logits, record_tokens, sample, top_k, verify_chain, verify_tree)
}
CPU = torch.device("cpu")


def outcome(trial, kernel):
    """Names of the outputs in which ``kernel`` differs from the oracle."""
    actual, expected = trial.run(kernel), trial.expected()
    assert set(actual) == set(expected) == set(trial.tolerance)
    return [name for name, limit in trial.tolerance.items() if not compare(actual[name], expected[name], limit).passed]


@pytest.mark.parametrize("name", OPERATIONS)
def test_reference_passes_every_case(name):
    operation = OPERATIONS[name]
    names = [case.name for case in operation.cases()]
    assert len(names) == len(set(names)) > 10
    for case in operation.cases():
        assert set(case.values) == set(operation.fields)
        assert outcome(case.build(CPU, 1), getattr(reference, name)) == [], case.name


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_kernel_that_writes_nothing_fails_every_case(name):
    for case in OPERATIONS[name].cases():
        in_place = name == "penalize_logits" and "in_place" in case.name
        if 0 in (case.values.get("top_n"), case.values.get("num_draft")) or in_place:
            continue
        assert outcome(case.build(CPU, 1), lambda *arguments: None), case.name


def test_verification_cases_accept_and_reject():
    for name in ("verify_chain", "verify_tree"):
        for case in OPERATIONS[name].cases():
            if case.name.startswith(("plain", "shuffled", "strided")):
                accepted = case.build(CPU, 1).expected()["num_accepted"]
                assert accepted.unique().numel() >= 3, case.name


@pytest.mark.parametrize("name", ["sample", "filter_logits"])
@pytest.mark.parametrize("error", [0.0, 2.0**-22, -(2.0**-22)])
@pytest.mark.parametrize("seed", [0, 7])
def test_cases_do_not_hang_on_the_rounding_of_an_exponential(name, error, seed, monkeypatch):
    def weights_of(logits, temperature):
        exact = Weights.of(logits, temperature)
        weight = torch.exp(-exact.shortfall) * (1 + error * (exact.shortfall > 0))
        return replace(exact, weight=weight, mass=to_mass(weight))

    class OtherWeights:
        of = staticmethod(weights_of)

    for case in OPERATIONS[name].cases():
        trial = case.build(CPU, seed)
        expected = trial.expected()
        with monkeypatch.context() as patch:
            patch.setattr(draw, "Weights", OtherWeights)
            actual = trial.run(getattr(reference, name))
        for output, limit in trial.tolerance.items():
            assert compare(actual[output], expected[output], limit).passed, (case.name, output)
