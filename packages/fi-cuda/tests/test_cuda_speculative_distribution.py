"""Speculative verification on the GPU keeps the target's distribution, with drafts that are deliberately bad: chi-square tests of
millions of drawn tokens."""

from __future__ import annotations

import fi_core as fi
import pytest
import torch
from fi_core.sampling import DrawKeys

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

NUM_REQUESTS, VOCAB, NUM_SEEDS = 500_000, 40, 8


def distributions():
    """The target's for two positions, and one for drafts that favours what the target hardly draws."""
    logits = torch.randn((2, VOCAB), device="cuda", generator=torch.Generator(device="cuda").manual_seed(4))
    return logits.softmax(1), (-logits[0]).softmax(0)


def keys_of(seed):
    number = torch.arange(NUM_REQUESTS, device="cuda")
    return DrawKeys(torch.full_like(number, seed), (number % 1000).to(torch.int32), number // 1000 * 5)


def check_distribution(counts, probs):
    expected = probs.double() * counts.sum()
    assert float(expected.min()) > 5
    statistic = ((counts.double() - expected) ** 2 / expected).sum()
    half = torch.stack([torch.full_like(statistic, VOCAB - 1), statistic]) / 2
    assert torch.special.gammaincc(half[0], half[1]) > 1e-4


def drafts_of(probs, count, seed):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.multinomial(probs, NUM_REQUESTS * count, replacement=True, generator=generator).view(-1, count)


def rows(*probs):
    return torch.stack(probs).expand(NUM_REQUESTS, -1, -1).contiguous()


def verified(verify, *args):
    """Counts of the first tokens, and of the second ones where a draft was accepted; the number of those."""
    first = torch.zeros(VOCAB, dtype=torch.int64, device="cuda")
    second, num_accepted = torch.zeros_like(first), 0
    for seed in range(NUM_SEEDS):
        tokens, *_, accepted = verify(seed, *args)
        assert int(tokens[:, 0].min()) >= 0
        first += tokens[:, 0].bincount(minlength=VOCAB)
        second += tokens[accepted > 0, 1].bincount(minlength=VOCAB)
        num_accepted += int((accepted > 0).sum())
    assert 0.001 < num_accepted / (NUM_REQUESTS * NUM_SEEDS) < 0.5  # a bad draft, but not one that is never accepted
    return first, second


@pytest.mark.parametrize("with_draft_probs", [False, True])
def test_chains_keep_the_distribution(with_draft_probs):
    target, draft = distributions()
    target_probs, draft_probs = rows(*target), rows(draft) if with_draft_probs else None

    def verify(seed):
        return fi.verify_chain(drafts_of(draft, 1, seed), draft_probs, target_probs, keys_of(seed))

    first, second = verified(verify)
    check_distribution(first, target[0])
    check_distribution(second, target[1])


def test_trees_keep_the_distribution():
    target, draft = distributions()
    target_probs = rows(target[0], target[1], target[1])
    parents = torch.full((NUM_REQUESTS, 2), -1, dtype=torch.int32, device="cuda")

    def verify(seed):
        return fi.verify_tree(drafts_of(draft, 2, seed), parents, target_probs, keys_of(seed))

    first, second = verified(verify)
    check_distribution(first, target[0])
    check_distribution(second, target[1])
