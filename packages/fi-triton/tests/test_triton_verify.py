"""Triton's verify_chain and verify_tree against a plain Python walk with exact integers."""

from __future__ import annotations

import math

import pytest
import torch
from fi_core.random import random_bits
from fi_core.sampling import DrawKeys
from fi_triton.sampling.verify import verify_chain, verify_tree

VOCAB, REQUESTS, DRAFTS = 37, 12, 3


def masses(row: torch.Tensor) -> list[int]:
    values = row.tolist()
    usable = all(0 <= value < 2 for value in values)
    return [int(value * 2**32) if usable else 0 for value in values]


class Draws:
    """Random numbers of one request, by (purpose, step)."""

    def __init__(self, keys: DrawKeys, request: int) -> None:
        self.keys = DrawKeys(
            *(column[request : request + 1].cpu() for column in (keys.seed, keys.sample, keys.position))
        )

    def number(self, purpose: int, step: int) -> int:
        hi, lo = random_bits(self.keys, purpose, step)
        return int(hi) * 2**31 + int(lo)

    def token(self, mass: list[int], purpose: int, step: int) -> int:
        goal, cumulative = self.number(purpose, step) * sum(mass) // 2**62, 0
        for token, amount in enumerate(mass):
            cumulative += amount
            if cumulative > goal:
                return token
        return -1


def chain(draws: Draws, drafted: list[int], proposals: torch.Tensor | None, targets: torch.Tensor) -> list[int]:
    """The tokens of one request; all but the last are accepted drafts."""
    tokens: list[int] = []
    for step, draft in enumerate([*drafted, -1]):
        target = masses(targets[step])
        legal = 0 <= draft < VOCAB
        if proposals is None:
            tokens.append(draws.token(target, 0, step))
            if not legal or tokens[-1] != draft:
                break
            continue
        if step == len(drafted):
            tokens.append(draws.token(target, 2, step))
            break
        proposal = masses(proposals[step])
        if legal:  # accepted by these two probabilities, whatever else the rows hold
            offered, wanted = (masses(row[step, draft : draft + 1])[0] for row in (proposals, targets))
            if draws.number(1, step) * offered // 2**62 < wanted:
                tokens.append(draft)
                continue
        residual = [max(p - q, 0) for p, q in zip(target, proposal, strict=True)]
        tokens.append(draws.token(residual if legal and sum(residual) else target, 2, step))
        break
    return tokens


def some_keys(device: str) -> DrawKeys:
    generator = torch.Generator().manual_seed(3)
    seed, position = torch.randint(-(2**62), 2**62, (2, REQUESTS), generator=generator)
    return DrawKeys(
        seed.to(device), torch.arange(REQUESTS, dtype=torch.int32, device=device), position.abs().to(device)
    )


def some_probs(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape, VOCAB, generator=torch.Generator().manual_seed(len(shape))) * 2).softmax(-1)


def spoil(probs: torch.Tensor) -> None:
    """Rows that nothing may be drawn from, and a single heavy row."""
    probs[1, 0, 5], probs[2, 1, 0], probs[3, 0, 1] = math.nan, -0.5, 2.0
    probs[4, 0] = 0.0
    probs[5, 1, 3] = math.inf


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("with_proposals", [False, True])
def test_chain(with_proposals, hostile, device):
    targets, proposals = some_probs(REQUESTS, DRAFTS + 1), some_probs(REQUESTS, DRAFTS) if with_proposals else None
    if hostile:
        spoil(targets)
        if proposals is not None:
            spoil(proposals[6:])
    keys = some_keys(device)
    drafts = torch.randint(0, VOCAB, (REQUESTS, DRAFTS), generator=torch.Generator().manual_seed(4))
    for request in range(0, REQUESTS, 2):  # every other request drafts what its draws will be, at least at first
        drafts[request, : 1 + request % DRAFTS] = torch.tensor(
            [
                Draws(keys, request).token(masses(targets[request, step]), 0, step)
                for step in range(1 + request % DRAFTS)
            ]
        )
    if hostile:
        drafts[7, 0], drafts[8, 1], drafts[9, 2] = -1, VOCAB, -(2**40)
    tokens = torch.full((REQUESTS, DRAFTS + 1), -99, device=device)
    num_accepted = torch.full((REQUESTS,), -99, dtype=torch.int32, device=device)
    on_device = None if proposals is None else proposals.to(device)
    verify_chain(drafts.to(device), on_device, targets.to(device), keys, tokens, num_accepted)
    for request in range(REQUESTS):
        one = None if proposals is None else proposals[request]
        expected = chain(Draws(keys, request), drafts[request].tolist(), one, targets[request])
        assert tokens[request].tolist() == expected + [-1] * (DRAFTS + 1 - len(expected)), request
        assert num_accepted[request].item() == len(expected) - 1
    if not hostile:
        assert num_accepted.max() >= 2


def test_chain_without_drafts_draws_one_token(device):
    targets, keys = some_probs(REQUESTS, 1), some_keys(device)
    tokens = torch.full((REQUESTS, 1), -99, device=device)
    num_accepted = torch.full((REQUESTS,), -99, dtype=torch.int32, device=device)
    drafts = torch.empty((REQUESTS, 0), dtype=torch.int64, device=device)
    verify_chain(drafts, None, targets.to(device), keys, tokens, num_accepted)
    assert tokens[:, 0].tolist() == [Draws(keys, n).token(masses(targets[n, 0]), 0, 0) for n in range(REQUESTS)]
    assert (num_accepted == 0).all()


@pytest.mark.parametrize("hostile", [False, True])
def test_tree(hostile, device):
    """Trees of 7 nodes in an order where children precede parents: node 6 and 5 are the root's, 4 and 3 under 6."""
    num_nodes = 7
    parents = torch.tensor([4, 4, 5, 6, 6, -1, -1], dtype=torch.int32).repeat(REQUESTS, 1)
    targets, keys = some_probs(REQUESTS, num_nodes + 1), some_keys(device)
    drafts = torch.randint(0, VOCAB, (REQUESTS, num_nodes), generator=torch.Generator().manual_seed(5))
    for request in range(0, REQUESTS, 2):
        for depth, (node, child) in enumerate([(-1, 6), (6, 4), (4, 1)][: 1 + request % 4]):
            drafts[request, child] = Draws(keys, request).token(masses(targets[request, node + 1]), 0, depth)
    if hostile:
        spoil(targets)
        drafts[6] = drafts[6, 6]  # siblings that hold the same token
        drafts[7] = -1
        parents[8] = torch.arange(num_nodes)  # nodes that are their own parents are never reached
    tokens = torch.full((REQUESTS, num_nodes + 1), -99, device=device)
    path = torch.full((REQUESTS, num_nodes + 1), -99, dtype=torch.int32, device=device)
    num_accepted = torch.full((REQUESTS,), -99, dtype=torch.int32, device=device)
    verify_tree(drafts.to(device), parents.to(device), targets.to(device), keys, tokens, path, num_accepted)
    for request in range(REQUESTS):
        node, expected, walked = -1, [], []
        while True:
            expected.append(Draws(keys, request).token(masses(targets[request, node + 1]), 0, len(walked)))
            held, above = drafts[request].tolist(), parents[request].tolist()
            below = [i for i in range(num_nodes) if above[i] == node and held[i] == expected[-1] >= 0]
            if not below:
                break
            node = below[0]
            walked.append(node)
        assert tokens[request].tolist() == expected + [-1] * (num_nodes + 1 - len(expected)), request
        assert path[request].tolist() == walked + [-1] * (num_nodes + 1 - len(walked))
        assert num_accepted[request].item() == len(walked)
    if not hostile:
        assert num_accepted.max() == 3
