"""Sampling on the host: on rows that the conformance cases do not have, against the reference."""

from __future__ import annotations

import kernel_exponential
import pytest
import torch
from emulated_kernels import emulate
from fi_core.reference.sampling import masses as reference_masses
from fi_core.reference.sampling.draw import filter_logits as reference_filter
from fi_core.reference.sampling.draw import sample as reference_sample
from fi_core.reference.sampling.ranking import top_k as reference_top_k
from fi_core.sampling import DrawKeys, FilterParams
from fi_cuda.kernels.sampling import filter_logits as filter_module
from fi_cuda.kernels.sampling import sample as sample_module
from fi_cuda.kernels.sampling import top_k as top_k_module
from fi_cuda.kernels.sampling.geometry import geometry

pytestmark = pytest.mark.timeout(300)

COLUMNS = {"top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32, "temperature": torch.float32}
ONE_BLOCK, TWO_BLOCKS, THREE_BLOCKS = (1, 128), (2, 256), (3, 128)
VOCAB = 1010


def rows_of(kind, vocab_size=VOCAB, num_rows=3):
    normal = torch.randn((num_rows, vocab_size), generator=torch.Generator().manual_seed(5))
    tokens = torch.arange(vocab_size)
    made = {
        "normal": lambda: 3 * normal,
        "peaked": lambda: 10 * normal,
        "narrow": lambda: 0.01 * normal,
        "equal": lambda: torch.full_like(normal, 0.25),
        "tied": lambda: (1.5 * normal).round(),
        "gap": lambda: torch.where(tokens % 3 == 0, 3 * normal, 3 * normal - 15),
        "one_hot": lambda: torch.where(tokens == 700, 40, normal),
        "few": lambda: torch.where(normal > 1.5, 3 * normal, -torch.inf),
        "bad": lambda: torch.where(tokens == 5, torch.tensor([[torch.nan], [torch.inf], [0.0]]), normal),
    }
    return made[kind]()


@pytest.fixture
def on_host(monkeypatch):
    """Makes the bindings run their kernels on the host, with a form of a row's cluster."""
    modules = (sample_module, filter_module, top_k_module)

    def prepare(form, seed=3):
        for module in modules:
            module._bound.cache_clear()
            monkeypatch.setattr(module, "geometry_for", lambda vocab, *_, **__: geometry(vocab, *form))
        emulate(monkeypatch, modules, seed=seed)

    yield prepare
    for module in modules:
        module._bound.cache_clear()


def parameters(values, num_rows, order="sequential"):
    columns = {name: torch.full((num_rows,), value, dtype=COLUMNS[name]) for name, value in values.items()}
    seed = torch.arange(num_rows) * 7919 + 5
    return FilterParams(**columns, order=order), DrawKeys(seed, torch.zeros_like(seed, dtype=torch.int32), seed + 100)


def check_draws(logits, values, orders=("sequential",)):
    for order in orders:
        filters, keys = parameters(values, logits.shape[0], order)
        tokens, expected = torch.full_like(keys.seed, -77), torch.empty_like(keys.seed)
        sample_module.sample(logits, filters, keys, None, tokens)
        reference_sample(logits, filters, keys, None, expected)
        assert tokens.tolist() == expected.tolist(), (values, order)


KINDS = ("normal", "peaked", "narrow", "equal", "tied", "gap", "one_hot", "few", "bad")


@pytest.mark.parametrize("form", [ONE_BLOCK, TWO_BLOCKS, THREE_BLOCKS])
def test_top_p_draws_what_the_reference_draws(on_host, form):
    on_host(form)
    for kind in KINDS:
        for top_p in (1e-6, 0.5, 0.9, 0.999999):
            check_draws(rows_of(kind), {"top_p": top_p})


def test_combined_filters_draw_what_the_reference_draws(on_host):
    on_host(TWO_BLOCKS)
    for kind in KINDS:
        for top_k in (50, 400):
            check_draws(rows_of(kind), {"top_k": top_k, "top_p": 0.9}, ("sequential", "joint"))


def test_draws_without_filters_are_those_of_the_reference(on_host):
    on_host(TWO_BLOCKS)
    for kind in KINDS:
        check_draws(rows_of(kind), {})
        check_draws(rows_of(kind), {"temperature": 0.7})


def test_probabilities_are_renormalised_over_what_top_p_keeps(on_host):
    on_host(TWO_BLOCKS)
    for kind in KINDS:
        logits = rows_of(kind)
        filters, _ = parameters({"top_p": 0.9}, logits.shape[0])
        out, expected = torch.full_like(logits, -7.0), torch.empty_like(logits)
        filter_module.filter_logits(logits, filters, "probs", out)
        reference_filter(logits, filters, "probs", expected)
        assert torch.equal(out > 0, expected > 0), kind
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-9), kind


@pytest.mark.parametrize(
    "values", [{}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9}], ids=lambda values: "+".join(values) or "plain"
)
def test_nothing_but_the_exponential_makes_draws_differ(on_host, values, monkeypatch):
    on_host(TWO_BLOCKS)
    emulate(monkeypatch, [kernel_exponential])
    for kind in ("normal", "narrow", "tied"):
        logits = rows_of(kind, num_rows=12)
        filters, keys = parameters(values, 12)
        tokens = torch.full_like(keys.seed, -77)
        sample_module.sample(logits, filters, keys, None, tokens)
        kernel_exponential.check_drawn(monkeypatch, tokens, logits, filters, keys)


def test_weights_on_the_host_are_as_exact_as_promised(monkeypatch):
    emulate(monkeypatch, [kernel_exponential])
    shortfalls = torch.cat([torch.linspace(0, 22.2, 5000), torch.linspace(0, 1e-3, 1000)])
    kernel_exponential.check_weights(shortfalls, reference_masses.exponential(shortfalls))


@pytest.mark.parametrize("seed", range(12))
def test_many_unlike_tokens_in_one_bin_are_searched_in_full(on_host, seed):
    on_host(TWO_BLOCKS, seed)
    tokens = torch.arange(VOCAB).expand(2, VOCAB)
    # Each of 64 bins is far wider than what lies between them.
    check_draws(torch.where(tokens < 40, 3.0 + tokens / 40, 1 + 1e-6 * (tokens % 7)), {"top_p": 0.9})


def test_logits_that_hardly_differ_are_told_apart(on_host):
    """By so little that bins of their range are narrower than the least float's reciprocal."""
    on_host(TWO_BLOCKS)
    tokens = torch.arange(3000).expand(3, 3000)
    logits = torch.where(tokens == 700, 5e-37, torch.where(tokens == 2900, 2e-37, 0.0))
    logits[1] = torch.where(tokens[1] == 7, 1e-37, 0.0)
    for values in ({"top_k": 5}, {"top_k": 2}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9}):
        check_draws(logits, values)
    values, indices = torch.full((3, 5), -7.0), torch.full((3, 5), -7)
    expected = torch.empty_like(values), torch.empty_like(indices)
    top_k_module.top_k(logits, values, indices)
    reference_top_k(logits, *expected)
    assert torch.equal(indices, expected[1]) and torch.equal(values, expected[0])


@pytest.mark.parametrize("k", [50, 600, 2048])
def test_top_k_is_that_of_the_reference(on_host, k):
    on_host(TWO_BLOCKS)
    for kind in KINDS:
        logits = rows_of(kind, vocab_size=3000)
        values, indices = torch.full((3, k), -7.0), torch.full((3, k), -7)
        expected = torch.empty_like(values), torch.empty_like(indices)
        top_k_module.top_k(logits, values, indices)
        reference_top_k(logits, *expected)
        assert torch.equal(indices, expected[1]), kind
        assert torch.equal(values, expected[0]), kind
