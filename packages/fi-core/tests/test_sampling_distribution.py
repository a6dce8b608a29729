"""Draws over many keys follow the filtered softmax, and numbers of different keys are independent."""

import fi_core as fi
import pytest
import torch

NUM_DRAWS = 60000


def chi_square_is_plausible(counts, probs, num_draws):
    """True when the statistic lies within 5 standard deviations of its mean (bins with an expectation below 5
    pooled)."""
    order = probs.argsort(descending=True)
    expected, counts = (probs[order] * num_draws).double(), counts[order].double()
    common = expected >= 5
    if (~common).any():
        expected = torch.cat([expected[common], expected[~common].sum().view(1)])
        counts = torch.cat([counts[common], counts[~common].sum().view(1)])
    used = expected > 0
    assert counts[~used].sum() == 0
    expected, counts = expected[used], counts[used]
    freedom = max(len(expected) - 1, 1)
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5 + 5


def many_keys(which):
    """NUM_DRAWS keys that differ in one part only."""
    count = torch.arange(NUM_DRAWS)
    parts = {
        "seed": torch.full_like(count, 7),
        "sample": torch.full_like(count, 1),
        "position": torch.full_like(count, 12),
    }
    parts[which] = count
    return fi.DrawKeys(parts["seed"], parts["sample"].to(torch.int32), parts["position"])


def logits_of(vocab_size=40):
    return torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0)) * 1.5


def draw_many(logits, filters, keys):
    return fi.sample(logits, filters, keys, rows=torch.zeros(NUM_DRAWS, dtype=torch.int32))


@pytest.mark.parametrize("which", ["seed", "sample", "position"])
def test_plain_draw_follows_softmax(which):
    logits = logits_of()
    filters = fi.FilterParams(temperature=torch.full((NUM_DRAWS,), 0.8))
    counts = draw_many(logits, filters, many_keys(which)).bincount(minlength=40)
    assert chi_square_is_plausible(counts, torch.softmax(logits[0].double() / 0.8, 0), NUM_DRAWS)


def test_the_check_can_fail():
    logits = logits_of()
    counts = draw_many(logits, fi.FilterParams(), many_keys("seed")).bincount(minlength=40)
    assert not chi_square_is_plausible(counts, torch.softmax(logits[0].double() / 1.05, 0), NUM_DRAWS)


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_filtered_draws_have_exactly_the_filtered_support(order):
    logits = logits_of()
    columns = {
        "top_k": torch.full((NUM_DRAWS,), 12, dtype=torch.int32),
        "top_p": torch.full((NUM_DRAWS,), 0.8),
        "min_p": torch.full((NUM_DRAWS,), 0.08),
    }
    probs = torch.softmax(logits[0].double(), 0)
    rank = probs.argsort(descending=True)
    kept = rank[:12]
    mass = probs[kept] / probs[kept].sum() if order == "sequential" else probs[kept]
    kept = kept[mass.cumsum(0) - mass < 0.8]
    kept = kept[probs[kept] >= 0.08 * probs.max()]
    counts = draw_many(logits, fi.FilterParams(**columns, order=order), many_keys("seed")).bincount(minlength=40)
    assert set(counts.nonzero().ravel().tolist()) == set(kept.tolist())
    filtered = torch.zeros_like(probs).index_copy(0, kept, probs[kept] / probs[kept].sum())
    assert chi_square_is_plausible(counts, filtered, NUM_DRAWS)


@pytest.mark.parametrize("which", ["seed", "sample", "position"])
def test_neighbouring_keys_are_independent(which):
    logits = torch.zeros(1, 6)
    tokens = draw_many(logits, fi.FilterParams(), many_keys(which))
    pairs = (tokens[:-1] * 6 + tokens[1:]).bincount(minlength=36)
    assert chi_square_is_plausible(pairs, torch.full((36,), 1 / 36), NUM_DRAWS - 1)
