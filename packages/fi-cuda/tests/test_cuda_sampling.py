"""Sampling of whole vocabularies on the GPU: distributions that the conformance cases are too small for, against the float64
reference, in every form of a row's cluster; the same bits on every run and in any batch."""

from __future__ import annotations

import pytest
import torch
from fi_core.reference.sampling.draw import filter_logits as reference_filter
from fi_core.reference.sampling.masses import exponential
from fi_core.reference.sampling.ranking import logprobs as reference_logprobs
from fi_core.reference.sampling.ranking import top_k as reference_top_k
from fi_core.sampling import DrawKeys, FilterParams, LogprobsOut
from fi_cuda.kernels.sampling import filter_logits as filter_module
from fi_cuda.kernels.sampling import sample as sample_module
from kernel_exponential import check_drawn, check_weights, kernel_weights

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

VOCAB = 128256
COLUMNS = {"top_k": torch.int32} | dict.fromkeys(("top_p", "min_p", "typical_p", "temperature"), torch.float32)
FILTERS: dict[str, dict[str, float]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.1},
    "large_top_k": {"top_k": 5000},
    "large_top_k_top_p": {"top_k": 5000, "top_p": 0.9},
    "all": {"top_k": 50, "top_p": 0.9, "min_p": 0.05, "temperature": 0.7},
}


def rows_of(kind: str, num_rows: int, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(3)
    normal = torch.randn((num_rows, vocab_size), device="cuda", generator=generator)
    made = {
        "normal": lambda: 3 * normal,
        "narrow": lambda: 0.01 * normal,
        "uniform": lambda: torch.rand((num_rows, vocab_size), device="cuda", generator=generator),
        "equal": lambda: torch.full_like(normal, 0.25),
        "tied": lambda: (1.5 * normal).round(),
        "rounded": lambda: (3 * normal).bfloat16().float(),
        "few": lambda: torch.where(normal > 3.1, 3 * normal, -torch.inf),
        # Much of the mass in few tokens, the rest spread: hard to estimate.
        "peak": lambda: torch.where(torch.arange(vocab_size, device="cuda") % 50000 == 7, 12.0, normal),
        "one_group": lambda: torch.where(torch.arange(vocab_size, device="cuda") < 200, 20 + normal, normal),
    }
    return made[kind]()


def parameters(values: dict[str, float], num_rows: int, order: str = "sequential") -> tuple[FilterParams, DrawKeys]:
    columns = {
        name: torch.full((num_rows,), value, dtype=COLUMNS[name], device="cuda") for name, value in values.items()
    }
    seed = torch.arange(num_rows, device="cuda") * 7919 + 5
    keys = DrawKeys(seed, torch.zeros_like(seed, dtype=torch.int32), seed + 100)
    return FilterParams(**columns, order=order), keys


def drawn(logits: torch.Tensor, filters: FilterParams, keys: DrawKeys) -> torch.Tensor:
    tokens = torch.full_like(keys.seed, -77)
    sample_module.sample(logits, filters, keys, None, tokens)
    return tokens


@pytest.mark.parametrize("num_rows", [3, 20, 70])
@pytest.mark.parametrize(
    "kind", ["normal", "narrow", "uniform", "equal", "tied", "rounded", "few", "peak", "one_group"]
)
def test_draws_are_those_of_the_reference(kind, num_rows, monkeypatch):
    logits = rows_of(kind, num_rows, VOCAB)
    for values in FILTERS.values():
        for order in ("sequential", "joint"):
            filters, keys = parameters(values, num_rows, order)
            check_drawn(monkeypatch, drawn(logits, filters, keys), logits, filters, keys)


@pytest.mark.parametrize("num_rows", [128, 300])
@pytest.mark.parametrize("kind", ["normal", "narrow", "peak"])
def test_tokens_at_the_edges_of_bins_are_found_where_they_are_counted(kind, num_rows, monkeypatch):
    # Rows enough that in some of them a token of the last level lies within rounding of a bin's edge.
    logits = rows_of(kind, num_rows, 32000)
    for values in (FILTERS["large_top_k"], FILTERS["large_top_k_top_p"], FILTERS["top_k"] | FILTERS["top_p"]):
        filters, keys = parameters(values, num_rows)
        check_drawn(monkeypatch, drawn(logits, filters, keys), logits, filters, keys)


def test_every_weight_is_as_exact_as_promised():
    last = torch.tensor(22.25).view(torch.int32).item()
    step = 2**26
    for begin in range(0, last + 1, step):
        shortfalls = torch.arange(begin, min(begin + step, last + 1), dtype=torch.int32, device="cuda").view(
            torch.float32
        )
        check_weights(shortfalls, exponential(shortfalls))
    for shortfall in (22.25, 23.0, 64.0, 88.0, 1e30, torch.inf, torch.nan):
        _, masses = kernel_weights(torch.full((1,), shortfall, device="cuda"))
        assert masses.item() == 0


@pytest.mark.parametrize("kind", ["normal", "narrow", "equal", "tied"])
def test_probabilities_are_those_of_the_reference(kind):
    logits = rows_of(kind, 5, VOCAB)
    for name in ("top_p", "top_k", "all"):
        filters, _ = parameters(FILTERS[name], 5)
        out = torch.full_like(logits, -7.0)
        expected = torch.empty_like(logits, dtype=torch.float64)
        filter_module.filter_logits(logits, filters, "probs", out)
        reference_filter(logits, filters, "probs", expected)
        assert torch.allclose(out.sum(dim=1), torch.ones(5, device="cuda"), atol=1e-4), name
        # A token at the limit may go either way.
        assert int(((out > 0) != (expected > 0)).sum(dim=1).max()) <= 1, name
        assert float((out - expected).abs().max()) < 1e-4, name


def test_a_row_draws_the_same_alone_and_in_any_batch():
    logits = rows_of("normal", 70, VOCAB)
    for values in FILTERS.values():
        filters, keys = parameters(values, 70)
        tokens = drawn(logits, filters, keys)
        assert torch.equal(tokens, drawn(logits, filters, keys))
        for row in (0, 33, 69):
            one, _ = parameters(values, 1)
            key = DrawKeys(keys.seed[row : row + 1], keys.sample[row : row + 1], keys.position[row : row + 1])
            assert drawn(logits[row : row + 1], one, key).item() == tokens[row].item()


@pytest.mark.parametrize("k", [513, 1000, 2048])
@pytest.mark.parametrize("kind", ["normal", "narrow", "tied", "few"])
def test_many_tokens_are_ranked_like_the_reference(kind, k):
    from fi_cuda.kernels.sampling.top_k import logprobs, top_k

    def outputs(num_rows):
        values = torch.full((num_rows, k), -7.0, device="cuda")
        return LogprobsOut(torch.full((num_rows,), -7.0, device="cuda"), values, torch.full_like(values, -7).long())

    for num_rows in (3, 40):
        logits = rows_of(kind, num_rows, VOCAB)
        found, expected = outputs(num_rows), outputs(num_rows)
        top_k(logits, found.values, found.indices)
        reference_top_k(logits, expected.values, expected.indices)
        assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)
        tokens = torch.arange(num_rows, device="cuda") * 1001
        found, expected = outputs(num_rows), outputs(num_rows)
        logprobs(logits, tokens, found)
        reference_logprobs(logits, tokens, expected)
        assert torch.equal(found.indices, expected.indices)
        assert torch.allclose(found.values, expected.values, rtol=1e-5, atol=1e-5)
        assert torch.allclose(found.chosen, expected.chosen, rtol=1e-5, atol=1e-5)
