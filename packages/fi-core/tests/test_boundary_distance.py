"""Draws with a bad exponential are explained by its error, and by no smaller one; draws that are wrong are not explained."""

import pytest
import torch
from fi_core.reference.sampling import masses
from fi_core.reference.sampling.boundary import boundary_distance
from fi_core.reference.sampling.draw import sample
from fi_core.sampling import DrawKeys, FilterParams

ERROR = 2.0**-12
VOCAB, NUM_ROWS = 400, 400
SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_p": {"top_p": 0.9},
    "top_k_top_p": {"top_k": 300, "top_p": 0.8},
    "min_p": {"min_p": 0.998},
    "all": {"top_k": 300, "top_p": 0.9, "min_p": 0.998},
}


def batch(values, order="sequential"):
    generator = torch.Generator().manual_seed(1)
    # So flat that every token is a boundary's neighbour, and sloped, so that errors of neighbours do not cancel.
    logits = 1e-4 * torch.randn((NUM_ROWS, VOCAB), generator=generator) - 5e-3 * torch.arange(VOCAB) / VOCAB
    columns = {
        name: torch.full((NUM_ROWS,), value, dtype=torch.int32 if name == "top_k" else torch.float32)
        for name, value in values.items()
    }
    seed = torch.arange(NUM_ROWS) * 7919
    return logits, FilterParams(**columns, order=order), DrawKeys(seed, torch.zeros(NUM_ROWS, dtype=torch.int32), seed)


def drawn(logits, filters, keys):
    tokens = torch.empty_like(keys.seed)
    sample(logits, filters, keys, None, tokens)
    return tokens


def drawn_badly(monkeypatch, logits, filters, keys):
    """With weights that are wrong by up to ERROR, though never out of order."""
    exact = masses.exponential

    def bad(shortfall):
        weight = exact(shortfall).double()
        return (weight * (1 + 0.999 * ERROR * torch.sin(1200 * shortfall.double()))).float()

    with monkeypatch.context() as patched:
        patched.setattr(masses, "exponential", bad)
        return drawn(logits, filters, keys)


@pytest.mark.parametrize("order", ["sequential", "joint"])
@pytest.mark.parametrize("values", SETTINGS.values(), ids=list(SETTINGS))
def test_other_draws_are_explained_by_the_error_alone(values, order, monkeypatch):
    logits, filters, keys = batch(values, order)
    tokens = drawn_badly(monkeypatch, logits, filters, keys)
    other = tokens != drawn(logits, filters, keys)
    assert other.any()
    distance = boundary_distance(tokens, logits, filters, keys, ERROR)
    assert not distance[~other].any()
    assert float(distance.max()) <= 1
    assert float(boundary_distance(tokens, logits, filters, keys, ERROR / 1000).max()) > 1


def test_wrong_draws_are_not_explained():
    logits, filters, keys = batch({"top_p": 0.9})
    tokens = drawn(logits, filters, keys)
    wrong = (tokens + 7) % VOCAB
    assert float(boundary_distance(wrong, logits, filters, keys, 2.0**-21).min()) > 1
    assert float(boundary_distance(torch.full_like(tokens, -1), logits, filters, keys, ERROR).min()) == torch.inf
    greedy = FilterParams(temperature=torch.zeros(NUM_ROWS))
    assert float(boundary_distance(tokens, logits, greedy, keys, ERROR).max()) == torch.inf
